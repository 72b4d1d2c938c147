"""Releases whose tensors are those of more than one network: what tells them apart, or that nothing does.

Pooling, time constants and heads have no tensors. Event models of the Spike-driven Transformer differ in nothing else,
nor does Spikingformer from Spikingformer with CML, whose code calls both by the same name.
"""

import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from timm.models import get_pretrained_cfg, model_entrypoint

from ..models.variants import default_args
from .bounds import check_model_args
from .checkpoints import Checkpoint, CheckpointError

if TYPE_CHECKING:
    from .infer import InferredModel

# What the trainings of releases call arguments of ours, by our module.
_STATED: Mapping[str, Mapping[str, str]] = {
    "sdt": {"pooling_stat": "pools", "dvs_mode": "dvs_mode", "num_heads": "num_heads"},
    "spikformer": {"num_heads": "num_heads"},
    "spikingformer": {"num_heads": "num_heads"},
}

_BLOCK = re.compile(r"block\.(\d{1,4})\.")

# Arguments that go with a number of classes in a release: Spikingformer has 12 heads for CIFAR-10, 8 for CIFAR-100.
_BY_CLASSES: Mapping[tuple[str, int], Mapping[str, Any]] = {
    ("spikingformer_4_384", 100): {"num_heads": 8},
    ("spikingformer_4_384_cml", 100): {"num_heads": 8},
}


def release_args(name: str, classes: int, checkpoint: Checkpoint) -> dict[str, Any]:
    """Arguments of a registered model that a release's training states, or that go with its number of classes."""
    known = _STATED.get(model_entrypoint(name).__module__.rpartition(".")[2], {})
    args = {ours: checkpoint.args.get(theirs) for theirs, ours in known.items()}
    stated = {key: value for key, value in args.items() if isinstance(value, (str, int))}
    stated = check_model_args({**_BY_CLASSES.get((name, classes), {}), **stated}, len(checkpoint.tensors))
    return {key: value for key, value in stated.items() if value != default_args(name).get(key)}


def misfit(name: str, tensors: Iterable[str]) -> str | None:
    """Why a registered model cannot be what a release's names are of, as far as these alone show it.

    Flat models' releases number their blocks `block.<i>`, hierarchical ones' `stage<n>.<i>`.
    """
    blocks = {int(found[1]) for found in map(_BLOCK.match, tensors) if found}
    depth = default_args(name).get("depth")
    if not blocks or (depth is not None and depth == len(blocks)):
        return None
    return f"the file has {len(blocks)} blocks at one resolution, the model has {depth or 'several resolutions'}"


def choose(fits: Mapping[str, "InferredModel"], checkpoint: Checkpoint) -> "InferredModel":
    """Of models whose release's names a checkpoint has, all of which it fits, the one that needs least said.

    Raises:
        CheckpointError: If that is not one, with their names.
    """
    best = _least_said(fits)
    if any(_network(found) != _network(best[0]) for found in best):
        names = [found.model for found in best]
        raise CheckpointError(
            f"{checkpoint.path}: its tensors are those of {' and of '.join(names)}, which are different networks, and "
            f"nothing in it says which one it is: name the model ({' or '.join(f'--model {name}' for name in names)})"
        )
    return best[0]


def prefer(fits: Mapping[str, "InferredModel"]) -> "InferredModel":
    """Of models that a checkpoint with this package's names fits, which all of them have, the likeliest.

    That is one that needs least said, a number of input channels for instance, and, among these, one with public code.
    """
    best = _least_said(fits)
    return next((found for found in best if _has_code(found.model)), best[0])


def _least_said(fits: Mapping[str, "InferredModel"]) -> list["InferredModel"]:
    fewest = min(len(found.model_args) for found in fits.values())
    return [found for found in fits.values() if len(found.model_args) == fewest]


def _has_code(name: str) -> bool:
    cfg: Any = get_pretrained_cfg(name)
    return bool(cfg.origin_url)


def _network(found: "InferredModel") -> dict[str, Any]:
    """What a model is made of, whatever it is called: its arguments but for those that every network may have."""
    args = {**default_args(found.model), **found.model_args}
    return {key: value for key, value in args.items() if key not in ("time_steps", "in_chans", "num_classes")}
