"""The model that a checkpoint belongs to, from the names and shapes of its tensors, its md5 or its file's name."""

import os
import re
import sys
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, NamedTuple

import timm
from timm.models import get_arch_pretrained_cfgs, get_pretrained_cfg, is_model, list_models, model_entrypoint
from torch import Tensor, nn

from ..errors import first_line
from ..models.aliases import current_name
from ..models.checkpoints import check_against_model
from .ambiguity import choose, misfit, prefer, release_args
from .bounds import MAX_TIME_STEPS, check_model_args, shown
from .checkpoints import Checkpoint, CheckpointError

# Of a training's `model_kwargs`, those that change nothing outside of training, or that the tensors show.
_NOT_STATED = {
    "attn_drop_rate", "bn_momentum", "drop_block_rate", "drop_path_rate", "drop_rate", "in_chans", "num_classes",
    "proj_drop_rate",
}  # fmt: skip
_FIRST_STAGE = re.compile(r"(patch_embed1?|stem)\..*weight")
_MLP = re.compile(r".*mlp\.(?:(?:fc|mlp)1[_.](?:conv|linear)|fc_conv1)\.weight")
_SHOWN = 800  # characters of a reason; names of tensors may have any length
_TIME_STEPS_IN_NAME = re.compile(r"[-_]T(\d{1,2})(?![0-9A-Za-z])")


class Release(NamedTuple):
    """A checkpoint of the authors' release.

    Its accuracy was measured with coupled neurons. `per_sample` is what independent measurements on the authors'
    tracker (issue 14) found with the same weights and neurons that keep samples apart.
    """

    model: str
    tag: str
    md5: str
    input_size: int
    top1: float  # percent, ImageNet-1k validation, as the file's name has it
    per_sample: float | None = None

    @property
    def name(self) -> str:
        return f"{self.model}.{self.tag}"


RELEASES = (
    Release("qkformer_hst10_384", "in1k", "60df416983ae326bb14bdb4566444320", 224, 78.85, 74.20),
    Release("qkformer_hst10_512", "in1k", "85dd1f94c87ba5ec908fed5d0a3f7f69", 224, 82.08),
    Release("qkformer_hst10_768", "in1k", "dc1595408ed1bd40346be2bdaf5015d5", 224, 84.29, 78.70),
    Release("qkformer_hst10_768", "ft288_in1k", "ba20af8eb450d4ec9c71009fde8e7125", 288, 85.30),
    Release("qkformer_hst10_768", "ft384_in1k", "99a671118f67a680aa38b6ac5aae449a", 384, 85.65),
)


def find_release(md5: str) -> Release | None:
    """The authors' checkpoint with this md5, if it is one."""
    return next((release for release in RELEASES if release.md5 == md5), None)


@dataclass
class InferredModel:
    """A checkpoint's model: registered name, arguments that differ from its defaults, tensors under its names."""

    model: str
    model_args: dict[str, Any]
    state_dict: dict[str, Tensor]
    time_steps: int
    time_steps_from: str
    also_fits: list[str] = field(default_factory=list)

    @property
    def ambiguity(self) -> str:
        """In words, that other models have the same tensors."""
        others = ", ".join(self.also_fits)
        return (
            f"the same tensors fit {others}, and no model is named: {self.model} is taken, which may be wrong; name it"
        )


def infer_architecture(
    checkpoint: Checkpoint,
    model: str | None = None,
    time_steps: int | None = None,
    model_args: Mapping[str, Any] | None = None,
) -> InferredModel:
    """Find the registered model that a checkpoint's tensors fit, all of them and exactly.

    A model that the checkpoint names is never exchanged for another one: it fits, or the checkpoint is refused.

    Args:
        checkpoint: What was read.
        model: Registered name, to be asked about this one alone. It may then fit by the order of its tensors, too.
        time_steps: Time steps T to write down. None: from the training's arguments, the file's name or the model's
            default, in this order.
        model_args: Arguments of the model that the tensors do not show, such as its heads; they go before what the
            training states.

    Raises:
        CheckpointError: If nothing fits, with what is wrong for the models that come closest, or if a release's
            tensors are those of several networks, with their names.
        ValueError: For a `model` or `time_steps` outside its range.
    """
    known, model = architectures(), None if model is None else current_name(model)
    if model is not None and model not in known:
        raise ValueError(f"model={model!r} is unknown, choose one of {', '.join(known)}")
    shapes = {name: list(tensor.shape) for name, tensor in checkpoint.tensors.items()}
    named = model or named_model(checkpoint, known)
    likely = named or _likely_model(checkpoint)
    width, args = _sizes(checkpoint, shapes, any_names=likely is not None)
    fits: dict[str, InferredModel] = {}
    released, reasons = [], []
    candidates = [named] if named else sorted(known, key=lambda name: name != likely)
    for name in candidates:
        stated = stated_args(checkpoint) if name in stated_names(checkpoint) else {}
        whose = [*(["that its training states"] if stated else []), *(["that are given"] if model_args else [])]
        stated |= model_args or {}
        if not stated and _width(name) != width:
            continue
        if name != likely and (reason := misfit(name, shapes)):
            reasons.append(f"{name}: {reason}")
            continue
        try:
            if not _is_own(shapes):
                stated = {**release_args(name, args["num_classes"], checkpoint), **stated}
            found = _fit(name, checkpoint.tensors, shapes, args, stated, " and ".join(whose))
        except ValueError as error:
            reasons.append(f"{name}: {error}")
            continue
        by_position = _by_position(found, checkpoint.tensors)
        if name == likely or not by_position:
            fits[name] = found
        else:
            reasons.append(f"{name}: fits by the order of its tensors alone, not by their names; if it is that, say so")
        if not by_position and not _is_own(shapes):
            released.append(name)
            if any(name.startswith("patch_embed1.") for name in shapes):
                break  # of hierarchical releases, no two have the same names
    if not fits:
        reasons = reasons or [f"its classifier takes {width} features, the width of none of {', '.join(candidates)}"]
        listed = "\n".join(f"- {textwrap.shorten(reason, _SHOWN)}" for reason in reasons)
        if named and not model:
            named_but = f"its training names the model {named}, which it does not fit; another one has to be named"
            raise CheckpointError(f"{checkpoint.path}: {named_but} (--model)\n{listed}")
        raise CheckpointError(f"{checkpoint.path}: no model fits\n{listed}")
    if released and likely not in fits:
        found = choose({name: fits[name] for name in released}, checkpoint)
    else:
        found = fits[likely] if likely in fits else prefer(fits)
        found.also_fits = [] if released else [name for name in fits if name != found.model]
    _find_time_steps(found, checkpoint, time_steps)
    return found


def _is_own(shapes: Mapping[str, Any]) -> bool:
    """Whether a checkpoint has this package's names, which its models share, and not those of a release."""
    return any(name.startswith("stages.") for name in shapes)


def stated_args(checkpoint: Checkpoint) -> dict[str, Any]:
    """What a training says that its model was created with, as timm's train.py and this package's write it.

    Raises:
        CheckpointError: If it is more than a file may ask for, or nothing that can be written down.
    """
    kwargs = checkpoint.args.get("model_kwargs") or {}
    try:
        if "model_kwargs" in checkpoint.unclear:
            raise ValueError("it states model_kwargs that are no numbers, words, or short rows of them by name")
        if not isinstance(kwargs, Mapping):
            raise ValueError(f"it states model_kwargs={shown(kwargs)}, which is no mapping")
        stated = {key: value for key, value in kwargs.items() if key not in _NOT_STATED and value is not None}
        if checkpoint.args.get("gp") is not None:
            stated["global_pool"] = checkpoint.args["gp"]
        depths, tensors = stated.get("depths", ()), len(checkpoint.tensors)
        blocks = depths if isinstance(depths, (list, tuple)) else [depths]
        if any(isinstance(count, int) and count > tensors for count in blocks):
            # A model on the meta device takes no memory for its weights, but for each block some, and time.
            raise CheckpointError(
                f"{checkpoint.path}: its training states depths={shown(depths)}, but it has {tensors} tensors"
            )
        return check_model_args(stated, tensors)
    except CheckpointError:
        raise
    except ValueError as error:
        raise CheckpointError(f"{checkpoint.path}: the arguments of its training cannot be used: {error}") from error


def architectures() -> list[str]:
    """Registered names of this package's models."""
    ours = __name__.split(".")[0] + ".models."
    return [name for name in list_models() if model_entrypoint(name).__module__.startswith(ours)]


@cache
def _width(name: str) -> int:
    for args in ({"depth": 0}, {"depths": (0, 0, 0)}, {}):  # blocks take time to build and do not change it
        try:
            model: Any = timm.create_model(name, device="meta", **args)
            break
        except (TypeError, ValueError):  # not an argument of this one
            continue
    return int(model.num_features)


def _classifier(shapes: Sequence[list[int]]) -> list[int]:
    """Shape of the classifier's matrix, where names do not say which one it is.

    It is at the end with its bias, or has square ones behind it, SpiLiFormer's decoders.
    """
    if len(shapes) > 1 and len(shapes[-2]) == 2 and shapes[-1] == shapes[-2][:1]:
        return shapes[-2]
    matrices = [shape for shape in reversed(shapes) if len(shape) == 2]
    return next((shape for shape in matrices if shape[0] != shape[1]), matrices[0] if matrices else [])


def _sizes(checkpoint: Checkpoint, shapes: dict[str, list[int]], any_names: bool) -> tuple[int, dict[str, Any]]:
    """Width of the classifier, and a model's arguments: classes and input channels (fewest of the first convolutions).

    With `any_names`, a checkpoint that has no such names has them in the order of its tensors.
    """
    maps = [shape for shape in shapes.values() if len(shape) == 4]
    head = shapes.get("head.weight") or (_classifier(list(shapes.values())) if any_names else [])
    if len(head) != 2 or min(head) < 1:
        raise CheckpointError(f"{checkpoint.path}: no model fits: there is no classifier (head.weight) in it")
    convs = [shape for name, shape in shapes.items() if _FIRST_STAGE.fullmatch(name) and len(shape) == 4]
    channels = [shape[1] for shape in convs or (maps[:1] if any_names else [])]
    if not channels or min(channels) < 1:
        raise CheckpointError(f"{checkpoint.path}: no model fits: there is no stem (patch_embed1.* or stem.*) in it")
    return head[1], {"num_classes": head[0], "in_chans": min(channels)}


def _fit(
    name: str,
    tensors: dict[str, Tensor],
    shapes: dict[str, list[int]],
    args: dict[str, Any],
    stated: dict[str, Any],
    whose: str,
) -> InferredModel:
    """The model of this name with these tensors, if all of them fit; else ValueError.

    Args:
        name, tensors, shapes: Of the model, of the checkpoint, and of its tensors.
        args: Arguments that the tensors show.
        stated: Further ones.
        whose: Where these are from, for errors.
    """
    cfg: Any = get_pretrained_cfg(name)
    defaults = {"num_classes": cfg.num_classes, "in_chans": cfg.input_size[0]}
    model_args: dict[str, Any] = {key: value for key, value in stated.items() if key != "time_steps"}
    model_args |= {key: value for key, value in args.items() if value != defaults[key]}
    args = {**stated, **args}
    model = _skeleton(name, args, whose)
    ratio = _mlp_ratio(shapes)
    if ratio is not None and ratio != _mlp_ratio({key: list(value.shape) for key, value in model.state_dict().items()}):
        model_args["mlp_ratio"] = ratio
        model = _skeleton(name, {**args, "mlp_ratio": ratio}, whose)
    before = dict(model._model_args)
    state_dict = fit_tensors(name, tensors, model)
    # A filter may have found arguments in the file, such as thresholds.
    model_args |= {key: value for key, value in model._model_args.items() if before.get(key) != value}
    return InferredModel(name, model_args, state_dict, model.time_steps, "by default, the file does not say")


def _skeleton(name: str, args: dict[str, Any], whose: str) -> Any:
    """The model on the meta device; ValueError for arguments that it does not take."""
    try:
        return timm.create_model(name, device="meta", **args)
    except ValueError:
        raise
    except Exception as error:  # what a file states may be wrong in any way
        raise ValueError(f"not with the arguments {whose or 'that its tensors show'}: {first_line(error)}") from error


def fit_tensors(name: str, tensors: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """The tensors under the names of `model`, which is registered as `name`; ValueError where they do not fit it."""
    module = sys.modules[model_entrypoint(name).__module__]
    state_dict: dict[str, Tensor] = module.checkpoint_filter_fn(dict(tensors), model)
    check_against_model(state_dict, model, original_names={}, adaptable={})
    expected = model.state_dict()
    for key, tensor in state_dict.items():
        if tensor.is_floating_point() != expected[key].is_floating_point():
            raise ValueError(f"{key} is {tensor.dtype}, the model has {expected[key].dtype}")
    return {key: state_dict[key] for key in expected}


def _mlp_ratio(shapes: dict[str, list[int]]) -> float | None:
    """Width of the MLPs relative to their stage's, where it is the same in all."""
    weights = [shape for name, shape in shapes.items() if _MLP.fullmatch(name)]
    ratios = {shape[0] / shape[1] for shape in weights if len(shape) > 1 and min(shape) > 0}
    return ratios.pop() if len(ratios) == 1 and 0.5 <= min(ratios) <= 16 else None


def _by_position(found: InferredModel, tensors: dict[str, Tensor]) -> bool:
    """Whether the model's filter went by the tensors' order: in another order, it would take others or refuse.

    The membrane-shortcut variant has the same shapes in the same order as the original, whose checkpoints would be
    taken for its own otherwise.
    """
    model = timm.create_model(found.model, device="meta", **found.model_args)
    try:
        again = fit_tensors(found.model, dict(reversed(tensors.items())), model)
    except ValueError:
        return True
    return any(again[name].data_ptr() != tensor.data_ptr() for name, tensor in found.state_dict.items())


def stated_names(checkpoint: Checkpoint) -> list[str]:
    """What a checkpoint calls its model, without tags: train.py's argument, the entry of timm's checkpoints."""
    words = (checkpoint.args.get("model"), checkpoint.arch)
    return [current_name(word.partition(".")[0]) for word in words if isinstance(word, str)]


def named_model(checkpoint: Checkpoint, known: list[str]) -> str | None:
    """The model that a checkpoint names; None if it names none, or has a word for it that nobody knows.

    CheckpointError for a model of timm that is none of this package's.
    """
    for word in stated_names(checkpoint):
        if word in known:
            return word
        if is_model(word):
            raise CheckpointError(
                f"{checkpoint.path}: its training names the model {word}, which is none of this package's"
            )
    return None


def _likely_model(checkpoint: Checkpoint) -> str | None:
    """The model that a checkpoint is of going by its md5 or its public file's name."""
    release = find_release(checkpoint.md5)
    if release is not None:
        return release.model
    asset = find_asset(checkpoint.path.name)
    return asset[0] if asset else None


def find_asset(file_name: str) -> tuple[str, str] | None:
    """Model and tag whose weights are downloaded under this file name."""
    for name in architectures():
        cfgs: dict[str, Any] = get_arch_pretrained_cfgs(name)
        for cfg in cfgs.values():
            if os.path.basename(cfg.url or cfg.hf_hub_filename or "") == file_name:
                return name, cfg.tag
    return None


def _find_time_steps(found: InferredModel, checkpoint: Checkpoint, time_steps: int | None) -> None:
    if time_steps is not None:
        if time_steps < 1:
            raise ValueError(f"time_steps={time_steps} must be at least 1")
        found.time_steps, found.time_steps_from = time_steps, "as given"
        return
    args = {**stated_args(checkpoint), **checkpoint.args}
    for key in ("time_step", "time_steps", "T", "step"):
        value = args.get(key)
        if isinstance(value, int) and not isinstance(value, bool) and value >= 1:
            if value > MAX_TIME_STEPS:
                raise CheckpointError(
                    f"{checkpoint.path}: its training states {key}={shown(value)}, 1 to {MAX_TIME_STEPS} are possible"
                )
            found.time_steps, found.time_steps_from = value, f"from the training's arguments, {key}={value}"
            return
    in_name = _TIME_STEPS_IN_NAME.search(checkpoint.path.name)
    if in_name and int(in_name[1]) >= 1:
        found.time_steps, found.time_steps_from = int(in_name[1]), f"from the file's name, {in_name[0].lstrip('-_')}"
