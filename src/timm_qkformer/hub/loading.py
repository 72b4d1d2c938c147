"""A model with its weights, from whatever a user can name on the command line."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import resolve_data_config
from timm.models import get_arch_pretrained_cfgs, get_pretrained_cfg, is_model

from .checkpoints import Checkpoint, read_checkpoint
from .infer import architectures, fit_tensors, infer_architecture, stated_args

# Of a training's arguments, those that prepare the model's input.
_DATA_ARGS = ("input_size", "interpolation", "mean", "std", "crop_pct", "crop_mode")


@dataclass(frozen=True)
class LoadedModel:
    """A model and where its weights come from."""

    model: Any  # in eval mode
    name: str  # registered, with the tag if it has one, and arguments that were given
    weights: str  # where they come from, for titles: "random weights (seed 0)", "weights of FILE", ...
    is_random: bool  # nothing was loaded

    @property
    def title(self) -> str:
        return f"{self.name}, {self.weights}"


def load_model(
    source: str,
    *,
    checkpoint: Path | None = None,
    random: bool = False,
    seed: int = 0,
    time_steps: int | None = None,
    model_args: dict[str, Any] | None = None,
) -> LoadedModel:
    """Create a model with its weights.

    Args:
        source: A registered name, with or without a tag: its pretrained weights where the tag has any, else random
            ones. A folder that `convert` wrote, or "local-dir:FOLDER" or "hf-hub:REPOSITORY". A checkpoint file: of a
            training by timm's train.py or this package, which says what it is of; else the model is inferred from its
            tensors.
        checkpoint: File with the weights for a registered name, for models that cannot be inferred because they
            have arguments of their own.
        random: Random weights, even where there are others.
        seed: Of the random weights.
        time_steps: Time steps T. None: the model's, or what the file says.
        model_args: Arguments of the model.

    Raises:
        ValueError: For a source that is none of these, or arguments that do not go together.
        OSError: If weights cannot be had.
    """
    if random and checkpoint is not None:
        raise ValueError(f"random weights and checkpoint={str(checkpoint)!r} exclude each other")
    args = dict(model_args or {}, **({} if time_steps is None else {"time_steps": time_steps}))
    path = Path(source)
    if path.is_dir() and not is_model(source.split(".")[0]):
        if not (path / "config.json").is_file():
            raise ValueError(f"{source} has no config.json: it is no folder that `timm-qkformer convert` wrote")
        source = f"local-dir:{source}"
    if ":" in source:
        if checkpoint is not None:
            raise ValueError(
                f"checkpoint={str(checkpoint)!r} is for a registered name; {source} has weights of its own"
            )
        return _create(source, random, seed, args, source.partition(":")[2].rstrip("/").rpartition("/")[2])
    if path.is_file():
        if random or checkpoint is not None or model_args:
            raise ValueError(f"{source} is a checkpoint file and stands for itself: no other options go with it")
        return _inferred(path, time_steps)
    if not is_model(source.partition(".")[0]):
        raise ValueError(
            f"{source!r} is neither a registered model (timm.list_models('*former*')), nor a folder or file that exists"
        )
    if checkpoint is not None:
        return _with_checkpoint(source, checkpoint, args)
    cfg: Any = get_pretrained_cfg(source)
    has_source = cfg is not None and bool(cfg.file or cfg.url or cfg.hf_hub_id or cfg.state_dict)
    return _create(source, random or not has_source, seed, args, source)


def _create(source: str, random: bool, seed: int, args: dict[str, Any], name: str) -> LoadedModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: Any = timm.create_model(source, pretrained=not random, **args).eval()
    tag = (getattr(model, "pretrained_cfg", None) or {}).get("tag")
    if not random and tag and "." not in name:
        name = f"{name}.{tag}"
    weights = f"random weights (seed {seed})" if random else "pretrained weights"
    return LoadedModel(model, _with_arguments(name, args), weights, random)


def _with_arguments(name: str, args: dict[str, Any]) -> str:
    """A model's name, with the arguments that make it another model than the registered one."""
    shown = [f"{key}={value}" for key, value in args.items() if key != "pretrained_cfg_overlay"]
    return f"{name} ({', '.join(shown)})" if shown else name


def _inferred(path: Path, time_steps: int | None) -> LoadedModel:
    read = read_checkpoint(path)
    if read.args.get("model") in architectures() and "num_classes" in read.args:
        return _trained(read, time_steps)
    found = infer_architecture(read, time_steps=time_steps)
    model: Any = timm.create_model(found.model, time_steps=found.time_steps, **found.model_args)
    model.load_state_dict(found.state_dict)
    return LoadedModel(model.eval(), found.model, f"weights of {path.name}", False)


def _trained(read: Checkpoint, time_steps: int | None) -> LoadedModel:
    """The model of a training checkpoint that says what it was created with, as timm's train.py writes it."""
    name, args = read.args["model"], stated_args(read)
    args |= {key: read.args[key] for key in ("num_classes", "in_chans") if key in read.args}
    if "in_chans" not in args and read.args.get("input_size"):
        args["in_chans"] = read.args["input_size"][0]
    args |= {} if time_steps is None else {"time_steps": time_steps}
    try:
        # Before memory is spent on sizes that only the file states, they must be those of its tensors.
        skeleton: Any = timm.create_model(name, device="meta", **args)
        tensors = fit_tensors(name, read.tensors, skeleton)
        config = resolve_data_config({key: read.args[key] for key in _DATA_ARGS if key in read.args}, model=skeleton)
        overlay = {key: config[key] for key in _DATA_ARGS if key in config}
        model: Any = timm.create_model(name, pretrained_cfg_overlay=overlay, **args)
    except (ValueError, TypeError, AssertionError, RuntimeError) as error:
        raise ValueError(f"{read.path}: not the {name} that its training's arguments describe: {error}") from error
    model.load_state_dict(tensors)
    return LoadedModel(model.eval(), name, f"weights of {read.path.name}", False)


def _with_checkpoint(source: str, path: Path, args: dict[str, Any]) -> LoadedModel:
    read = read_checkpoint(path)
    model: Any = timm.create_model(source, **args)
    try:
        model.load_state_dict(fit_tensors(source.partition(".")[0], read.tensors, model))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return LoadedModel(model.eval(), _with_arguments(source, args), f"weights of {path.name}", False)


def shipped_models() -> list[str]:
    """Names, with tags, of the models whose weights come with the package."""
    return [
        name_and_tag
        for name in architectures()
        for name_and_tag, cfg in get_arch_pretrained_cfgs(name).items()
        if cfg.file and Path(cfg.file).is_file()
    ]
