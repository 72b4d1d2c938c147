"""Command line and recipe to settings that have been checked."""

import argparse
import difflib
import math
import reprlib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any

import yaml

from ..recipes import list_recipes, read_yaml, recipe_path
from .settings import ALIASES, LOADED, OPTIONS, UNSUPPORTED, Option, Settings, current_names

_RECIPE = "recipe: a YAML file, or a name such as cpu_cifar10"
# What is for images only.
_IMAGES_ONLY = (
    "train_crop_mode", "scale", "ratio", "vflip", "color_jitter", "color_jitter_prob", "grayscale_prob",
    "gaussian_blur_prob", "reprob", "remode", "recount", "aug_repeats", "crop_pct", "interpolation",
    "crop_padding", "train_interpolation", "class_map", "input_img_mode", "input_key", "target_key", "dataset_download",
    "channels_last",
)  # fmt: skip
# Smallest values.
_LEAST = {
    **dict.fromkeys(("batch_size", "epochs", "log_interval", "val_interval", "checkpoint_hist", "lr_base_size"), 1),
    **dict.fromkeys(("workers", "recovery_interval", "warmup_epochs", "cooldown_epochs", "mixup_off_epoch"), 0),
    **{"start_epoch": 0, "crop_padding": 0, "time_steps_random_from": 0, "validation_batch_size": 1, "num_classes": 1},
}
# Probabilities and shares.
_SHARES = (
    "hflip", "vflip", "reprob", "mixup_prob", "mixup_switch_prob", "drop", "drop_path", "drop_block", "model_ema_decay",
    "color_jitter_prob", "grayscale_prob", "gaussian_blur_prob", "momentum", "bn_momentum", "tet", "tet_lambda",
    "firing_rate_target",
)  # fmt: skip
_MOST_STEPS = 10_000
# More would have the machine stand still before an error came.
_MOST = {"workers": 1024, "weight_decay": 1e6, "epochs": 10**7, "warmup_epochs": 10**7, "cooldown_epochs": 10**7}


def parse_train(argv: Sequence[str]) -> Settings:
    """The settings of a command line of `timm-qkformer train`."""
    parser = argparse.ArgumentParser(prog="timm-qkformer train")
    add_train_arguments(parser)
    return resolve_train(vars(parser.parse_args(argv)))


def resolve_train(given: Mapping[str, Any]) -> Settings:
    """Settings of a training run: what was given, by name, overrides the recipe ("config"), and this the defaults.

    ValueError if a key is unknown, not supported, of the wrong type, or does not fit the others.
    """
    settings = Settings(**merge_settings(given))
    _check_train(settings)
    return settings


def merge_settings(given: Mapping[str, Any], known: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Values of `Settings`: what was given, the recipe and what is known from elsewhere, in this order."""
    for name, words in given.items():
        if name in UNSUPPORTED:
            _refuse(name, _from_command_line(words), f"--{name.replace('_', '-')}")
    recipe = read_recipe(given["config"]) if given.get("config") else {}
    values = current_names(known or {}) | recipe | current_names(given)
    values = {name: value for name, value in values.items() if name in OPTIONS}
    values["data_dir"] = values.get("data_dir") or values.get("data")
    values["grad_accum_steps"] = max(1, values.get("grad_accum_steps", 1))
    return values


def plain_settings(settings: Settings) -> dict[str, Any]:
    """All of train.py's keys and ours as values that YAML and checkpoints hold without any class."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {str(k): plain(v) for k, v in value.items()}
        if isinstance(value, (list, tuple)):
            return [plain(v) for v in value]
        if isinstance(value, float) and not math.isfinite(value):
            return str(value)
        return value if isinstance(value, (bool, int, float, str)) or value is None else str(value)

    values = {name: default for name, (default, _) in UNSUPPORTED.items()} | vars(settings)
    return {name: plain(value) for name, value in sorted(values.items())}


def require_data_dir(settings: Settings) -> None:
    """Refuse settings that name no folder of the data (ValueError); Hugging Face data sets alone need none."""
    if not settings.data_dir and not settings.dataset.lower().startswith("hfds/"):
        raise ValueError("data_dir is missing: say where the data is with --data-dir DIR")


def read_recipe(recipe: str) -> dict[str, Any]:
    """The checked values of a recipe, given as a file or by the name of one that comes with the package.

    FileNotFoundError if there is neither; ValueError if it is no mapping, or a key or value is not train.py's or ours.
    """
    path = Path(recipe)
    if not path.is_file():
        names = list_recipes()
        if recipe not in names:
            raise FileNotFoundError(f"recipe {recipe!r} is neither a file nor one of {', '.join(names)}")
        path = recipe_path(recipe)
    content = read_yaml(path)
    if not isinstance(content, dict):
        raise ValueError(f"recipe {path} needs to hold 'key: value' lines, got {type(content).__name__}")
    return current_names({key: _checked(path, key, value) for key, value in content.items()})


def _checked(path: Path, key: Any, value: Any) -> Any:
    if key in UNSUPPORTED:
        _refuse(key, value, f"recipe {path}: {key}")
        return value
    if key not in OPTIONS and key not in ALIASES:
        close = difflib.get_close_matches(str(key), [*OPTIONS, *UNSUPPORTED], n=1)
        raise ValueError(
            f"recipe {path}: key {_shown(key)} is unknown" + (f"; did you mean {close[0]!r}?" if close else "")
        )
    option = OPTIONS[ALIASES.get(key, key)]
    try:
        return _converted(option, value)
    except (TypeError, ValueError):
        several = f" (list of {option.length or 'any number'})" if option.is_list else ""
        wanted = {bool: "true or false", dict: "a mapping"}.get(option.type, option.type.__name__)
        if option.choices:
            wanted = " or ".join(repr(choice) for choice in option.choices)
        raise ValueError(f"recipe {path}: {key} needs to be {wanted}{several}, got {_shown(value)}") from None


def _converted(option: Option, value: Any) -> Any:
    if value is None:
        if option.default is not None:
            raise ValueError
        return None
    if option.is_list:
        if not isinstance(value, list) or len(value) != (option.length or len(value)):
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


def _shown(value: Any) -> str:
    """A value for a message, which YAML's aliases may have made longer than any memory."""
    return reprlib.repr(value) if isinstance(value, (list, dict)) else repr(value)[:200]


def _refuse(name: str, value: Any, where: str) -> None:
    default, reason = UNSUPPORTED[name]
    if value not in (default, [default]) and [value] != default:
        raise ValueError(f"{where} {_shown(value)} is not supported: {reason}")


def _check_train(settings: Settings) -> None:
    def need(condition: bool, name: str, what: str) -> None:
        if not condition:
            raise ValueError(f"{name}={getattr(settings, name)!r} needs to be {what}")

    for name, least in _LEAST.items():
        value = getattr(settings, name)
        need(value is None or value >= least, name, f"at least {least}")
    for name in ("lr", "lr_base"):
        value = getattr(settings, name)
        need(value is None or (math.isfinite(value) and value > 0), name, "above 0")
    for option in OPTIONS.values():
        value = getattr(settings, option.name)
        if option.type is float and value is not None:
            need(all(map(math.isfinite, value if option.is_list else [value])), option.name, "finite")
    for name in _SHARES:
        value = getattr(settings, name)
        need(value is None or 0 <= value <= 1, name, "from 0 to 1")
    for name, most in _MOST.items():
        need(getattr(settings, name) <= most, name, f"at most {most}")
    _check_name(settings.experiment)
    if settings.time_steps_random is not None:
        low, high = settings.time_steps_random
        need(1 <= low <= high <= _MOST_STEPS, "time_steps_random", f"LOW HIGH, from 1 to {_MOST_STEPS:,}")
    elif settings.time_steps_random_from:
        raise ValueError(f"time_steps_random_from={settings.time_steps_random_from} needs time_steps_random LOW HIGH")
    if settings.crop_padding and (settings.no_aug or settings.train_crop_mode):
        other = "no_aug" if settings.no_aug else f"train_crop_mode={settings.train_crop_mode!r}"
        raise ValueError(f"crop_padding={settings.crop_padding} is a way to crop, and so is {other}")
    if settings.tet is not None and settings.torchcompile:
        raise ValueError(f"tet={settings.tet} looks into the model at each step, which torchcompile does not allow")
    if settings.tet_lambda and not settings.tet:
        raise ValueError(f"tet_lambda={settings.tet_lambda} is a part of the steps' own losses, which need tet above 0")
    _check_penalty(settings, need)
    _check_distillation(settings, need)
    if settings.class_weights is not None:
        need(all(w > 0 for w in settings.class_weights), "class_weights", "above 0, one for each class")
        if settings.bce_loss:
            raise ValueError("class_weights are those of cross-entropy; with bce_loss there is --bce-pos-weight")
    need(settings.lr_base_scale in ("", "linear", "sqrt"), "lr_base_scale", "'linear', 'sqrt' or ''")
    need(0 <= settings.smoothing < 1, "smoothing", "from 0 to below 1")
    if settings.uses_mixup:
        need(settings.batch_size % 2 == 0, "batch_size", "even, since mixup pairs the samples of a batch")
    if settings.amp and settings.model_dtype not in (None, "float32"):
        raise ValueError(f"model_dtype={settings.model_dtype!r} does not go with amp, which keeps float32 weights")
    if settings.pretrained_path and not settings.pretrained:
        raise ValueError(
            f"pretrained_path={str(settings.pretrained_path)!r} needs pretrained, too: --pretrained loads it"
        )
    if settings.input_size is not None and settings.channels != settings.input_size[0]:
        raise ValueError(f"in_chans={settings.in_chans} and input_size={settings.input_size} disagree on the channels")
    require_data_dir(settings)
    prefix = settings.dataset.partition("/")[0].lower()
    if prefix in ("tfds", "wds", "hfids"):
        raise ValueError(f"dataset={settings.dataset!r} is streamed, which cannot be resumed in the middle of an epoch")
    if prefix == "events":
        _check_events(settings)


def _check_penalty(settings: Settings, need: Callable[[bool, str, str], None]) -> None:
    weight = settings.firing_rate_penalty
    need(weight is None or weight >= 0, "firing_rate_penalty", "at least 0")
    if settings.firing_rate_target and weight is None:
        raise ValueError(f"firing_rate_target={settings.firing_rate_target} needs firing_rate_penalty")
    if not weight:
        return
    for name in ("torchcompile", "grad_checkpointing"):
        if getattr(settings, name):
            raise ValueError(f"firing_rate_penalty={weight} watches neurons fire, which {name} does not allow")


def _check_distillation(settings: Settings, need: Callable[[bool, str, str], None]) -> None:
    need(settings.kd_temperature > 0, "kd_temperature", "above 0")
    for name in ("distill_loss_weight", "task_loss_weight"):
        weight = getattr(settings, name)
        need(weight is None or weight >= 0, name, "at least 0")
        if weight is not None and not settings.kd_model_name:
            raise ValueError(f"{name}={weight} needs a teacher, kd_model_name")
    if settings.kd_model_name and settings.tet:
        raise ValueError(f"tet={settings.tet} is not part of distillation from {settings.kd_model_name}")


def _check_name(name: str) -> None:
    """The run's folder lies in `output`, and its name can be shown."""
    if name in (".", "..") or "/" in name or "\\" in name or Path(name).name != name or not name.isprintable():
        raise ValueError(
            f"experiment={name!r} needs to be the name of one folder, without separators and control characters; "
            f"--output says where it is made"
        )


def _check_events(settings: Settings) -> None:
    """Augmentations that are for images only must not be asked for, and then not happen."""
    for name in _IMAGES_ONLY:
        # 0 switches off what is on by default for images
        if getattr(settings, name) not in (OPTIONS[name].default, 0):
            raise ValueError(
                f"{name}={getattr(settings, name)!r} is for images and has no meaning for {settings.dataset}"
            )
    if settings.aa not in (None, "snn-wide"):
        raise ValueError(f"aa={settings.aa!r} is for images; for events it needs to be 'snn-wide' or left out")


class _KeywordArguments(argparse.Action):
    """KEY=VALUE ... to a dict, by timm's rules."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, *_: Any) -> None:
        from timm.utils import ParseKwargs

        bad = [value for value in values if "=" not in value]
        if bad:
            parser.error(f"argument {self.option_strings[0]}: expected KEY=VALUE, got {bad[0]!r}")
        ParseKwargs(self.option_strings, self.dest)(parser, namespace, values)


def add_train_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what `timm-qkformer train` takes."""
    parser.add_argument("-c", "--config", metavar="RECIPE", help=_RECIPE)
    _add_options(parser)


def add_validate_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what `timm-qkformer validate` takes."""
    add_measured_arguments(parser)
    parser.add_argument("--results-file", metavar="FILE", help="write the results to a new .json or .csv file")


def add_measured_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what commands take that measure a model on labelled data: the model, the data, where they run."""
    name = "name of the model, with a tag for pretrained weights; a converted folder"
    parser.add_argument("model", metavar="MODEL", help=name)
    parser.add_argument("--time-steps", type=int, metavar="T", help="the same as --model-kwargs time_steps=T")
    parser.add_argument("--checkpoint", metavar="FILE", help="weights, and where it is a trainer's, its settings")
    parser.add_argument("--no-ema", action="store_true", help="the weights themselves, not their moving average")
    parser.add_argument("--split", metavar="NAME", help="split to validate on (the recipe's val_split, or validation)")
    parser.add_argument("-c", "--config", metavar="RECIPE", help=_RECIPE)
    _add_options(parser, only=LOADED)


def _add_options(parser: argparse.ArgumentParser, only: Collection[str] | None = None) -> None:
    """Add options by name (None: all, refused ones too). The namespace then holds what was given, and no defaults."""
    for group, options in groupby(OPTIONS.values(), lambda option: option.group):
        chosen = [option for option in options if only is None or option.name in only]
        section = parser.add_argument_group(group) if chosen else parser
        for option in chosen:
            _add(section, option)
    for former, name in ALIASES.items():
        _add(parser, replace(OPTIONS[name], name=former, help=argparse.SUPPRESS))
    for name in UNSUPPORTED if only is None else ():
        flag = f"--{name.replace('_', '-')}"
        parser.add_argument(flag, dest=name, nargs="*", default=argparse.SUPPRESS, help=argparse.SUPPRESS)


def _add(section: Any, option: Option) -> None:
    kwargs: dict[str, Any] = {"default": argparse.SUPPRESS, "help": option.help}
    if option.default not in (None, False, "", {}):
        shown = " ".join(f"{v:.4g}" for v in option.default) if option.is_list else option.default
        kwargs["help"] += f" ({shown})"
    if option.type is bool:
        # --no-aug and its like are the switch itself
        two_ways = not option.name.startswith("no_")
        kwargs["action"] = argparse.BooleanOptionalAction if two_ways else "store_true"
    elif option.type is dict:
        kwargs |= {"action": _KeywordArguments, "nargs": "*", "metavar": option.metavar}
    else:
        kwargs |= {"type": option.type, "choices": option.choices, "metavar": option.metavar}
        if option.is_list:
            kwargs["nargs"] = option.length or "+"
        elif option.positional:
            kwargs["nargs"] = "?"
        elif option.const:
            kwargs |= {"nargs": "?", "const": option.const}
    if option.positional:
        section.add_argument(option.name, **kwargs)
    else:
        flag = f"--{option.name.replace('_', '-')}"
        flags = sorted([flag, option.also] if option.also else [flag], key=lambda flag: flag.startswith("--"))
        section.add_argument(*flags, dest=option.name, **kwargs)
