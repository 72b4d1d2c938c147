"""What a file may ask for: bounds on the arguments of a model that a checkpoint or a config.json states.

Building a model on the meta device takes no memory for its weights, but time and memory for each of its modules; and
what is built for real must be of the size of the weights that the file holds.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import printable

MAX_TIME_STEPS = 1024
MAX_BLOCKS = 512  # in one number or one list
MAX_NUMBER = 1 << 20
MAX_TEXT = 200
MAX_ENTRIES = 64  # of a list or a mapping
MAX_DEPTH = 4  # of lists and mappings in each other

# timm's own, by which a file would choose where weights come from, or what kind of object is made.
_NOT_FOR_FILES = {
    "cache_dir", "checkpoint_path", "device", "dtype", "exportable", "feature_cfg", "features_only", "kwargs_filter",
    "model_cls", "model_name", "no_jit", "out_indices", "pretrained", "pretrained_cfg", "pretrained_cfg_overlay",
    "pretrained_custom_load", "pretrained_filter_fn", "pretrained_model_args", "pretrained_strict", "scriptable",
    "tag_args", "variant",
}  # fmt: skip


def check_model_args(args: Any, tensors: int) -> dict[str, Any]:
    """A model's arguments as a file states them, if they are within bounds; ValueError naming the one that is not.

    Args:
        args: What the file states.
        tensors: How many the file holds: there cannot be more blocks.
    """
    if not isinstance(args, Mapping):
        raise ValueError(f"its arguments need to be a mapping, got {shown(args)}")
    if len(args) > MAX_ENTRIES:
        raise ValueError(f"it states {len(args)} arguments, more than the {MAX_ENTRIES} that a file may")
    for key, value in args.items():
        if not isinstance(key, str) or not key.isidentifier() or key in _NOT_FOR_FILES:
            raise ValueError(f"it states {shown(key)}={shown(value)}, which is no argument that a file may give")
        reason = _misfit(value)
        if reason is None and key == "time_steps":
            whole = isinstance(value, int) and not isinstance(value, bool)
            if not whole or not 1 <= value <= MAX_TIME_STEPS:
                reason = f"a whole number from 1 to {MAX_TIME_STEPS} is needed"
        if reason is None and "depth" in key:
            numbers = [n for n in (value if isinstance(value, Sequence) else [value]) if isinstance(n, (int, float))]
            most = min(MAX_BLOCKS, tensors)
            if sum(numbers) > most or min(numbers, default=0) < 0:
                reason = f"0 to {most} blocks are possible in a file of {tensors} tensors"
        if reason is not None:
            raise ValueError(f"it states {key}={shown(value)}: {reason}")
    return dict(args)


def _misfit(value: Any, depth: int = 0) -> str | None:
    """Why no model has an argument like this; None if one may."""
    if value is None or isinstance(value, bool):
        return None
    if isinstance(value, (int, float)):
        if isinstance(value, float) and not math.isfinite(value):
            return "a finite number is needed"
        return f"numbers up to {MAX_NUMBER:,} are possible" if abs(value) > MAX_NUMBER else None
    if isinstance(value, str):
        return None if len(value) <= MAX_TEXT and value.isprintable() else f"up to {MAX_TEXT} printable characters"
    if not isinstance(value, (Mapping, list, tuple)):
        return f"{type(value).__name__} is no kind of argument"
    if len(value) > MAX_ENTRIES or depth == MAX_DEPTH:
        return f"up to {MAX_ENTRIES} entries and {MAX_DEPTH} levels are possible"
    if isinstance(value, Mapping):
        if not all(isinstance(key, str) for key in value):
            return "its keys need to be words"
        value = list(value.values())
    return next((reason for item in value if (reason := _misfit(item, depth + 1)) is not None), None)


def shown(value: Any) -> str:
    """A value from a file as an error may quote it: short, and without characters that a terminal acts on."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # numbers of thousands of digits, lists that hold themselves
        text = type(value).__name__
    return printable(text if len(text) <= 80 else f"{text[:77]}...")
