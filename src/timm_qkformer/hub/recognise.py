"""Which model a checkpoint belongs to, from the names and shapes of its tensors."""

import re
import sys
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Optional

import timm
from timm.models import get_pretrained_cfg, list_models, model_entrypoint
from torch import Tensor, nn

from ..models._checkpoint import check_against_model
from .checkpoints import Checkpoint, CheckpointError

__all__ = ["Recognised", "recognise"]

_FIRST_STAGE = re.compile(r"(patch_embed1|stem)\..*weight")
_MLP = re.compile(r"(.*mlp\.)(?:fc|mlp)([12])[_.]conv\.weight")
_TIME_STEPS_IN_NAME = re.compile(r"[-_]T(\d{1,2})\b")


@dataclass
class Recognised:
    """A checkpoint's model: registered name, arguments that differ from its defaults, tensors under its names."""

    model: str
    model_args: dict[str, Any]
    state_dict: dict[str, Tensor]
    time_steps: int
    time_steps_from: str
    also_fits: list[str] = field(default_factory=list)


def recognise(checkpoint: Checkpoint, model: Optional[str] = None, time_steps: Optional[int] = None) -> Recognised:
    """Find the registered model that a checkpoint's tensors fit, all of them and exactly.

    Args:
        checkpoint: What was read.
        model: Registered name, to be asked about this one alone.
        time_steps: Time steps T to write down. None: from the training's arguments, the file's name or the model's
            default, in this order.

    Raises:
        CheckpointError: If nothing fits, with what is wrong for the models that come closest.
        ValueError: For a `model` or `time_steps` outside its range.
    """
    known = architectures()
    if model is not None and model not in known:
        raise ValueError(f"model={model!r} is unknown, choose one of {', '.join(known)}")
    shapes = {name: list(tensor.shape) for name, tensor in checkpoint.tensors.items()}
    args = _sizes(checkpoint, shapes)
    width = shapes["head.weight"][1]
    candidates = [name for name in ([model] if model else known) if _width(name) == width]
    fits: dict[str, Recognised] = {}
    reasons = []
    for name in candidates:
        try:
            fits[name] = _fit(name, checkpoint.tensors, shapes, args)
        except ValueError as error:
            reasons.append(f"{name}: {error}")
    if not fits:
        reasons = reasons or [
            f"its classifier takes {width} features, which is the width of none of {', '.join(known)}"
        ]
        raise CheckpointError(f"{checkpoint.path}: no model fits\n" + "\n".join(f"- {reason}" for reason in reasons))
    found = fits.pop(_preferred(list(fits), checkpoint))
    found.also_fits = list(fits)
    _find_time_steps(found, checkpoint, time_steps)
    return found


def architectures() -> list[str]:
    """Registered names of this package's models."""
    ours = __name__.split(".")[0] + ".models."
    return [name for name in list_models() if model_entrypoint(name).__module__.startswith(ours)]


@cache
def _width(name: str) -> int:
    model: Any = timm.create_model(name, device="meta")
    return int(model.num_features)


def _sizes(checkpoint: Checkpoint, shapes: dict[str, list[int]]) -> dict[str, Any]:
    """Classes and input channels. The first convolution is the stem's one with the fewest input channels."""
    head = shapes.get("head.weight", [])
    if len(head) != 2:
        raise CheckpointError(f"{checkpoint.path}: no model fits: there is no classifier (head.weight) in it")
    channels = [shape[1] for name, shape in shapes.items() if _FIRST_STAGE.fullmatch(name) and len(shape) == 4]
    if not channels:
        raise CheckpointError(f"{checkpoint.path}: no model fits: there is no stem (patch_embed1.* or stem.*) in it")
    return {"num_classes": head[0], "in_chans": min(channels)}


def _fit(name: str, tensors: dict[str, Tensor], shapes: dict[str, list[int]], args: dict[str, Any]) -> Recognised:
    """The model of this name with these tensors, if all of them fit; else ValueError."""
    cfg: Any = get_pretrained_cfg(name)
    defaults = {"num_classes": cfg.num_classes, "in_chans": cfg.input_size[0]}
    model_args: dict[str, Any] = {key: value for key, value in args.items() if value != defaults[key]}
    model: Any = timm.create_model(name, device="meta", **args)
    ratio = _mlp_ratio(shapes)
    if ratio is not None and ratio != _mlp_ratio({key: list(value.shape) for key, value in model.state_dict().items()}):
        model_args["mlp_ratio"] = ratio
        model = timm.create_model(name, device="meta", mlp_ratio=ratio, **args)
    state_dict = _filter(name, tensors, model)
    return Recognised(name, model_args, state_dict, model.time_steps, "by default, the file does not say")


def _filter(name: str, tensors: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    module = sys.modules[model_entrypoint(name).__module__]
    state_dict: dict[str, Tensor] = module.checkpoint_filter_fn(dict(tensors), model)
    check_against_model(state_dict, model, original_names={}, adaptable={})
    return {key: state_dict[key] for key in model.state_dict()}


def _mlp_ratio(shapes: dict[str, list[int]]) -> Optional[float]:
    """Width of the MLPs relative to their stage's, where it is the same in all."""
    ratios = {shape[0] / shape[1] for name, shape in shapes.items() if (m := _MLP.fullmatch(name)) and m[2] == "1"}
    return ratios.pop() if len(ratios) == 1 else None


def _preferred(names: list[str], checkpoint: Checkpoint) -> str:
    """One of the models that fit.

    The membrane-shortcut variant has the same tensors as the original. Where both filters take a checkpoint, its
    file name decides, as its release names it: ms_*.
    """
    shortcut = [name for name in names if name.endswith("_ms")]
    if len(names) > 1 and shortcut:
        rest = [name for name in names if name not in shortcut]
        names = shortcut if re.match(r"ms[_-]", checkpoint.path.name) else rest or shortcut
    return names[0]


def _find_time_steps(found: Recognised, checkpoint: Checkpoint, time_steps: Optional[int]) -> None:
    if time_steps is not None:
        if time_steps < 1:
            raise ValueError(f"time_steps={time_steps} must be at least 1")
        found.time_steps, found.time_steps_from = time_steps, "as given"
        return
    for key in ("time_step", "time_steps", "T"):
        value = checkpoint.args.get(key)
        if isinstance(value, int) and not isinstance(value, bool) and value >= 1:
            found.time_steps, found.time_steps_from = value, f"from the training's arguments, {key}={value}"
            return
    in_name = _TIME_STEPS_IN_NAME.search(checkpoint.path.name)
    if in_name and int(in_name[1]) >= 1:
        found.time_steps, found.time_steps_from = int(in_name[1]), f"from the file's name, {in_name[0].lstrip('-_')}"
