"""From flags and recipe to one checked set of values."""

import argparse
import difflib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from ..recipes import list_recipes, recipe_path
from .options import OPTIONS, OURS, UNSUPPORTED, Option, add_train_arguments

__all__ = ["OF_PROCESS", "given_in", "mixes", "need_data_dir", "parse_train", "read_recipe", "resolve", "resolve_train"]

# What is for images only.
_IMAGES_ONLY = (
    "train_crop_mode", "scale", "ratio", "vflip", "color_jitter", "color_jitter_prob", "grayscale_prob",
    "gaussian_blur_prob", "reprob", "remode", "recount", "aug_repeats", "crop_pct", "interpolation",
    "train_interpolation", "class_map", "input_img_mode", "input_key", "target_key", "dataset_download",
    "channels_last",
)  # fmt: skip
# What a run's settings have besides options: where the process stands among the others.
OF_PROCESS = ("distributed", "rank", "world_size")

_OPTIONS: dict[str, Option] = {option.name: option for group in (*OPTIONS.values(), OURS) for option in group}


def parse_train(argv: Sequence[str]) -> argparse.Namespace:
    """The settings of a command line of `timm-qkformer train`."""
    parser = argparse.ArgumentParser(prog="timm-qkformer train")
    add_train_arguments(parser)
    return resolve_train(vars(parser.parse_args(argv)))


def resolve_train(given: Mapping[str, Any]) -> argparse.Namespace:
    """Settings of a training run: what was given, before the recipe it names, before the defaults.

    Args:
        given: Options by name, with the recipe under "config".

    Raises:
        ValueError: If a key is unknown, not supported, of the wrong type, or does not fit the others.
    """
    args = resolve(given)
    args.data_dir = args.data_dir or args.data
    args.grad_accum_steps = max(1, args.grad_accum_steps)
    _check_train(args)
    return args


def resolve(given: Mapping[str, Any], known: Mapping[str, Any] | None = None) -> argparse.Namespace:
    """Merge what was given, the recipe and what is known from elsewhere, in this order, over the defaults."""
    recipe = given.get("config")
    values = {name: option.default for name, option in _OPTIONS.items()}
    values |= {name: default for name, (default, _) in UNSUPPORTED.items()}
    values |= known or {}
    if recipe:
        values |= read_recipe(recipe)
    for name, value in given.items():
        if name in UNSUPPORTED:
            value = _from_command_line(value)
            _refuse(name, value, f"--{name.replace('_', '-')}")
        if name in values:
            values[name] = value
    return argparse.Namespace(**values)


def given_in(args: argparse.Namespace, *groups: str) -> dict[str, Any]:
    """The settings of these groups of options that are not the defaults."""
    options = [option for group in groups for option in OPTIONS[group]]
    return {o.name: getattr(args, o.name) for o in options if getattr(args, o.name) != o.default}


def mixes(args: argparse.Namespace) -> bool:
    """Whether training mixes samples, by mixup or CutMix."""
    return args.mixup > 0 or args.cutmix > 0 or args.cutmix_minmax is not None


def need_data_dir(args: argparse.Namespace) -> None:
    """Refuse settings that do not say where the data is.

    Raises:
        ValueError: If they do not; Hugging Face data sets alone have a place of their own.
    """
    if not args.data_dir and not args.dataset.lower().startswith("hfds/"):
        raise ValueError("data_dir is missing: say where the data is with --data-dir DIR")


def read_recipe(recipe: str) -> dict[str, Any]:
    """The checked values of a recipe, given as a file or by the name of one that comes with the package.

    Raises:
        FileNotFoundError: If there is neither.
        ValueError: If it is not a mapping, or a key or value is not one of train.py's or ours.
    """
    path = Path(recipe)
    if not path.is_file():
        names = list_recipes()
        if recipe not in names:
            raise FileNotFoundError(f"recipe {recipe!r} is neither a file nor one of {', '.join(names)}")
        path = recipe_path(recipe)
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"recipe {path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise ValueError(f"recipe {path} needs to hold 'key: value' lines, got {type(content).__name__}")
    return {key: _checked(path, key, value) for key, value in content.items()}


def _checked(path: Path, key: Any, value: Any) -> Any:
    if key in UNSUPPORTED:
        _refuse(key, value, f"recipe {path}: {key}")
        return value
    if key not in _OPTIONS:
        close = difflib.get_close_matches(str(key), [*_OPTIONS, *UNSUPPORTED], n=1)
        raise ValueError(f"recipe {path}: key {key!r} is unknown" + (f"; did you mean {close[0]!r}?" if close else ""))
    option = _OPTIONS[key]
    try:
        return _converted(option, value)
    except (TypeError, ValueError):
        several = f" (list of {option.nargs if isinstance(option.nargs, int) else 'any number'})"
        wanted = {bool: "true or false", dict: "a mapping"}.get(option.type, option.type.__name__)
        if option.choices:
            wanted = " or ".join(repr(choice) for choice in option.choices)
        raise ValueError(
            f"recipe {path}: {key} needs to be {wanted}{several if _is_list(option) else ''}, got {value!r}"
        ) from None


def _is_list(option: Option) -> bool:
    return option.nargs not in (None, "?")


def _converted(option: Option, value: Any) -> Any:
    if value is None:
        if option.default is not None:
            raise ValueError
        return None
    if _is_list(option):
        if not isinstance(value, list) or (isinstance(option.nargs, int) and len(value) != option.nargs):
            raise ValueError
        return [_scalar(option.type, v) for v in value]
    if option.type in (bool, dict):
        if not isinstance(value, option.type):
            raise TypeError
        return value
    value = _scalar(option.type, value)
    if option.choices and value not in option.choices:
        raise ValueError
    return value


def _scalar(kind: type, value: Any) -> Any:
    if kind is float and isinstance(value, str):
        return float(value)  # YAML reads 1e-3 as text
    accepted = (int, float) if kind is float else (kind,)
    if type(value) not in accepted:
        raise TypeError
    return kind(value)


def _from_command_line(words: Any) -> Any:
    """What an unsupported flag was set to: the values as YAML reads them, true for none."""
    if not isinstance(words, list):
        return words
    values = [yaml.safe_load(word) for word in words]
    return True if not values else values[0] if len(values) == 1 else values


def _refuse(name: str, value: Any, where: str) -> None:
    default, reason = UNSUPPORTED[name]
    if value not in (default, [default]) and [value] != default:
        raise ValueError(f"{where} {value!r} is not supported: {reason}")


def _check_train(args: argparse.Namespace) -> None:
    def need(condition: bool, name: str, what: str) -> None:
        if not condition:
            raise ValueError(f"{name}={getattr(args, name)!r} needs to be {what}")

    positive = ("batch_size", "epochs", "log_interval", "val_interval", "checkpoint_hist", "lr_base_size")
    for name in positive:
        need(getattr(args, name) >= 1, name, "at least 1")
    for name in ("workers", "recovery_interval", "warmup_epochs", "cooldown_epochs", "mixup_off_epoch"):
        need(getattr(args, name) >= 0, name, "at least 0")
    for name in ("lr", "lr_base"):
        value = getattr(args, name)
        need(value is None or (math.isfinite(value) and value > 0), name, "above 0")
    need(args.start_epoch is None or args.start_epoch >= 0, "start_epoch", "at least 0")
    need(args.validation_batch_size is None or args.validation_batch_size >= 1, "validation_batch_size", "at least 1")
    need(args.num_classes is None or args.num_classes >= 1, "num_classes", "at least 1")
    need(args.lr_base_scale in ("", "linear", "sqrt"), "lr_base_scale", "'linear', 'sqrt' or ''")
    need(0 <= args.smoothing < 1, "smoothing", "from 0 to below 1")
    if mixes(args):
        need(args.batch_size % 2 == 0, "batch_size", "even, since mixup pairs the samples of a batch")
    if args.amp and args.model_dtype not in (None, "float32"):
        raise ValueError(f"model_dtype={args.model_dtype!r} does not go with amp, which keeps float32 weights")
    if args.pretrained_path and not args.pretrained:
        raise ValueError(f"pretrained_path={str(args.pretrained_path)!r} needs pretrained, too: --pretrained loads it")
    if args.in_chans is not None and args.input_size is not None and args.in_chans != args.input_size[0]:
        raise ValueError(f"in_chans={args.in_chans} and input_size={args.input_size} disagree on the channels")
    need_data_dir(args)
    prefix = args.dataset.partition("/")[0].lower()
    if prefix in ("tfds", "wds", "hfids"):
        raise ValueError(f"dataset={args.dataset!r} is streamed, which cannot be resumed in the middle of an epoch")
    if prefix == "events":
        _check_events(args)


def _check_events(args: argparse.Namespace) -> None:
    """Augmentations that are for images only must not be asked for, and then not happen."""
    for name in _IMAGES_ONLY:
        # 0 switches off what is on by default for images
        if getattr(args, name) not in (_OPTIONS[name].default, 0):
            raise ValueError(f"{name}={getattr(args, name)!r} is for images and has no meaning for {args.dataset}")
    if args.aa not in (None, "snn-wide"):
        raise ValueError(f"aa={args.aa!r} is for images; for events it needs to be 'snn-wide' or left out")
