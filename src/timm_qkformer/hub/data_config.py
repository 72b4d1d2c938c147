"""What a checkpoint's model is shown, going by its training: one place for `convert` and for all that loads a file."""

from collections.abc import Mapping
from typing import Any

import timm
from timm.models import get_arch_pretrained_cfgs

from ..data.sources import EVENT_DATASETS
from .checkpoints import Checkpoint
from .infer import InferredModel, Release, stated_names

_MODES = {
    "interpolation": ("bilinear", "bicubic", "nearest", "box", "hamming", "lanczos"),
    "crop_mode": ("center", "squash", "border"),
}
_SIZES = range(16, 4097)


def pretrained_overlay(
    found: InferredModel,
    checkpoint: Checkpoint,
    release: Release | None = None,
    tag: str | None = None,
    input_size: int | None = None,
) -> dict[str, Any]:
    """What differs from a pretrained config of the model: input size, normalisation, interpolation and crop as the
    training evaluated with; where its arguments do not state them, as the tag or the model has them.

    Args:
        found: The model of the checkpoint.
        checkpoint: With its training's arguments.
        release: The authors' checkpoint that it is.
        tag: Pretrained tag whose config counts where the training's arguments say nothing.
        input_size: Pixels per side, instead of what the training states.
    """
    args = checkpoint.args
    registered: dict[str, Any] = get_arch_pretrained_cfgs(found.model)
    ours = found.model in stated_names(checkpoint)  # trained with timm's way to evaluate, or this one's
    trained = registered.get(str(args.get("model"))) if ours else None
    default: Any = registered.get(f"{found.model}.{tag}") or trained or timm.get_pretrained_cfg(found.model)
    channels = found.model_args.get("in_chans", default.input_size[0])
    overlay: dict[str, Any] = {
        key: getattr(default, key) for key in ("pool_size", "crop_pct", "crop_mode", "interpolation")
    }
    size = (input_size, input_size) if input_size else None
    if size is None and release is not None:
        size = (release.input_size, release.input_size)
    size = size or _trained_size(args) or default.input_size[1:]
    overlay["input_size"] = (channels, *size)
    if tuple(size) != tuple(default.input_size[1:]):
        overlay["pool_size"] = None
        if not ours and default.crop_pct < 1.0 and max(size) > 224:
            overlay["crop_pct"] = 1.0  # as the releases evaluate at that size
    crop = args.get("crop_pct")
    if isinstance(crop, (int, float)) and not isinstance(crop, bool) and 0 < crop <= 2:
        overlay["crop_pct"] = float(crop)
    for key, known in _MODES.items():
        if args.get(key) in known:
            overlay[key] = args[key]
    if _is_events(args) and channels == 2:
        overlay |= {"mean": (0.0, 0.0), "std": (1.0, 1.0)}  # frames are normalised only where that is asked for
    for key in ("mean", "std"):
        if (values := _numbers(args.get(key), channels)) and (key == "mean" or min(values) > 0):
            overlay[key] = values
    return overlay


def _is_events(args: Mapping[str, Any]) -> bool:
    return str(args.get("dataset", "")).lower().startswith("events/")


def _numbers(values: Any, channels: int) -> tuple[float, ...] | None:
    """One number for each channel, if these are that."""
    if not isinstance(values, (list, tuple)) or len(values) not in (1, channels):
        return None
    if not all(isinstance(value, (int, float)) and 0 <= value <= 255 for value in values):
        return None
    return tuple(map(float, values)) * (channels if len(values) == 1 else 1)


def _trained_size(args: Mapping[str, Any]) -> tuple[int, int] | None:
    """Height and width in the training's arguments: the ImageNet code's name for it, timm's two, the camera's size."""
    camera, side = None, args.get("img_size")
    if _is_events(args):  # frames have the camera's size unless another one is asked for
        camera = args.get("event_sensor_size")
        known = EVENT_DATASETS.get(str(args["dataset"]).partition("/")[2])
        camera, side = camera if camera is not None or known is None else known[0], None
    for value in (args.get("input_size"), side, camera):
        sides: list[Any] = list(value) if isinstance(value, (list, tuple)) else [value]
        sides = sides[-2:] if len(sides) in (2, 3) else sides * 2
        if len(sides) == 2 and all(type(side) is int and side in _SIZES for side in sides):
            height, width = sides
            return height, width
    return None
