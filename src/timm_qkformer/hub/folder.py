"""A folder that `convert` wrote, or somebody else: its config.json is looked through before a model is made of it."""

import json
import math
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import timm
from safetensors import SafetensorError, safe_open
from timm.models import is_model
from timm.models._pretrained import PretrainedCfg

from ..errors import first_line
from .bounds import MAX_NUMBER, check_model_args, shown
from .checkpoints import MAX_TENSORS

MAX_CONFIG_BYTES = 8 << 20  # with the names of 20,000 classes it has half of one
WEIGHTS = "model.safetensors"
_MAX_SIDE = 8192  # pixels

Check = Callable[[Any], bool]


def _number(value: Any) -> bool:
    if type(value) is float:
        return math.isfinite(value)
    return type(value) is int and abs(value) <= MAX_NUMBER


def _whole(value: Any, least: int, most: int) -> bool:
    return type(value) is int and least <= value <= most


def _per_channel(value: Any) -> bool:
    return isinstance(value, list) and 0 < len(value) <= 1024 and all(_number(v) and abs(v) <= 1e6 for v in value)


def _size(value: Any) -> bool:
    if not isinstance(value, list) or len(value) != 3:
        return False
    return _whole(value[0], 1, 1024) and all(_whole(side, 1, _MAX_SIDE) for side in value[1:])


def _word(value: Any) -> bool:
    return isinstance(value, str) and len(value) <= 100_000


def _names(value: Any) -> bool:
    return isinstance(value, (list, dict)) and len(value) <= MAX_NUMBER and all(isinstance(v, str) for v in value)


# What the entries of a pretrained config need to be, and a check, where it is not any text.
_ENTRIES: dict[str, tuple[str, Check]] = {
    **dict.fromkeys(("input_size", "test_input_size", "min_input_size"), ("[channels, height, width]", _size)),
    **dict.fromkeys(("crop_pct", "test_crop_pct"), ("a number above 0", lambda v: _number(v) and 0 < v <= 16)),
    "mean": ("a list of numbers", _per_channel),
    "std": ("a list of numbers above 0", lambda v: _per_channel(v) and min(v) > 0),
    "num_classes": ("a whole number", lambda v: _whole(v, 0, MAX_NUMBER)),
    "interpolation": (
        "a way to resize",
        lambda v: v in ("bilinear", "bicubic", "nearest", "box", "hamming", "lanczos", "random"),
    ),
    "crop_mode": ("a way to crop", lambda v: v in ("center", "squash", "border")),
    "label_offset": ("a whole number", lambda v: _whole(v, -MAX_NUMBER, MAX_NUMBER)),
    "label_names": ("names", _names),
    "label_descriptions": ("names", _names),
    **dict.fromkeys(
        ("pool_size", "test_pool_size"), ("two numbers", lambda v: isinstance(v, list) and all(map(_number, v)))
    ),
    **dict.fromkeys(("fixed_input_size", "custom_load"), ("true or false", lambda v: isinstance(v, bool))),
    **dict.fromkeys(("paper_ids", "notes"), ("text", lambda v: _word(v) or _names(v))),
}
# timm overwrites these with the folder; in a config.json they would point elsewhere.
_SOURCES = {"url", "file", "state_dict", "hf_hub_id", "hf_hub_filename", "source"}


def check_folder(folder: Path) -> dict[str, Any]:
    """Read a folder's config.json, and see that its weights are of the model that it describes.

    Returns:
        What stands in config.json.

    Raises:
        ValueError: Naming the file and the entry, for what is missing, of a wrong kind, out of bounds, or does not fit
            the weights.
    """
    path = folder / "config.json"
    try:
        config = _read(path)
        found = _shapes(folder / WEIGHTS)
        _compare(found, config, _check(config, len(found)))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error.__cause__
    return config


def _read(path: Path) -> dict[str, Any]:
    try:
        if not path.is_file():
            raise ValueError("there is no such file: it is no folder that `timm-qkformer convert` wrote")
        size = path.stat().st_size
        if size > MAX_CONFIG_BYTES:
            raise ValueError(f"{size:,} bytes are more than a config.json has (limit {MAX_CONFIG_BYTES:,})")
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"it cannot be read as JSON ({first_line(error)})") from error
    if not isinstance(config, dict):
        raise ValueError("it needs to be a mapping")
    return config


def _check(config: dict[str, Any], tensors: int) -> dict[str, Any]:
    """The model's arguments, when all entries that timm reads are what they need to be."""
    name = config.get("architecture")
    if not isinstance(name, str) or not is_model(name):
        raise ValueError(f"architecture={shown(name)} is no model that timm knows")
    cfg = config.get("pretrained_cfg")
    if not isinstance(cfg, dict):
        raise ValueError(f"pretrained_cfg={shown(cfg)} needs to be a mapping")
    known = {field.name for field in fields(PretrainedCfg)}
    for key, value in cfg.items():
        if key not in known or key in _SOURCES:
            raise ValueError(f"pretrained_cfg has an entry {shown(key)}, which it may not have")
        _check_entry(f"pretrained_cfg.{key}", key, value)
    for key in ("num_classes", "label_names", "label_descriptions"):
        _check_entry(key, key, config.get(key))
    args = check_model_args(config.get("model_args") or {}, tensors)
    for key in ("in_chans", "num_classes"):
        if key in args and not _whole(args[key], 0, MAX_NUMBER):
            raise ValueError(f"model_args.{key}={shown(args[key])} needs to be a whole number")
    return args


def _check_entry(where: str, key: str, value: Any) -> None:
    wanted, check = _ENTRIES.get(key, ("text", _word))
    if value is not None and not check(value):
        raise ValueError(f"{where}={shown(value)} needs to be {wanted}")


def _shapes(path: Path) -> dict[str, list[int]]:
    """Names and shapes of the weights, from the file's header."""
    if not path.is_file():
        raise ValueError(f"there is no {path.name} beside it")
    try:
        with safe_open(path, framework="pt") as file:
            names = set(file.keys())
            if len(names) > MAX_TENSORS:
                raise ValueError(f"{path.name} has {len(names):,} tensors, none of these models has as many")
            return {name: list(file.get_slice(name).get_shape()) for name in names}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path.name} is damaged or cut off ({first_line(error)})") from error


def _compare(found: dict[str, list[int]], config: dict[str, Any], args: dict[str, Any]) -> None:
    """See that the weights have the names and shapes of the model's, before memory is spent on it."""
    name, classes = config["architecture"], config.get("num_classes", config["pretrained_cfg"].get("num_classes"))
    try:
        skeleton: Any = timm.create_model(name, device="meta", **{"num_classes": classes, **args})
    except Exception as error:  # what a file states may be wrong in any way
        raise ValueError(f"{name} cannot be made with its model_args ({first_line(error)})") from error
    wanted = {key: list(tensor.shape) for key, tensor in skeleton.state_dict().items()}
    for key in sorted(found.keys() | wanted.keys()):
        if found.get(key) != wanted.get(key):
            raise ValueError(
                f"{WEIGHTS} is not of the model that it describes: {shown(key)} has the shape {found.get(key)}, "
                f"the model's {wanted.get(key)}"
            )
