"""A model with its weights, from whatever a user can name on the command line."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import get_arch_pretrained_cfgs, get_pretrained_cfg, is_model

from ..models.aliases import current_name
from ..models.loading import check_tag
from .checkpoints import read_checkpoint
from .data_config import pretrained_overlay
from .folder import check_folder
from .infer import architectures, find_release, fit_tensors, infer_architecture

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoadedModel:
    """A model and where its weights come from."""

    model: Any  # in eval mode
    name: str  # registered, with the tag if it has one, and arguments that were given
    weights: str  # where they come from, for titles: "random weights (seed 0)", "weights of FILE", ...
    is_random: bool  # nothing was loaded

    @property
    def title(self) -> str:
        """Name and weights, for pictures."""
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
            training by timm's train.py or this package, which says what it is of and what it was shown; else the
            model is inferred from its tensors, with a warning where several fit.
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
    source = current_name(source)
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
        if source.startswith("local-dir:"):
            check_folder(Path(source.removeprefix("local-dir:")))
        return _create(source, random, seed, args, source.partition(":")[2].rstrip("/").rpartition("/")[2])
    if path.is_file():
        if random or checkpoint is not None or model_args:
            raise ValueError(f"{source} is a checkpoint file and stands for itself: no other options go with it")
        return _inferred(path, time_steps)
    if not is_model(source.partition(".")[0]):
        raise ValueError(
            f"{source!r} is neither a registered model (timm.list_models('*former*')), nor a folder or file that exists"
        )
    check_tag(source)
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
    release = find_release(read.md5)
    # Before memory is spent on sizes that only the file states, they are found to be those of its tensors.
    found = infer_architecture(read, release.model if release else None, time_steps)
    if found.also_fits:
        _logger.warning("%s: %s", path, found.ambiguity)
    overlay = pretrained_overlay(found, read, release)
    model: Any = timm.create_model(
        found.model, pretrained_cfg_overlay=overlay, time_steps=found.time_steps, **found.model_args
    )
    model.load_state_dict(found.state_dict)
    return LoadedModel(model.eval(), found.model, f"weights of {path.name}", False)


def _with_checkpoint(source: str, path: Path, args: dict[str, Any]) -> LoadedModel:
    read = read_checkpoint(path)
    model: Any = timm.create_model(source, **args)
    try:
        model.load_state_dict(fit_tensors(source.partition(".")[0], read.tensors, model))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return LoadedModel(model.eval(), _with_arguments(source, args), f"weights of {path.name}", False)


def shipped_models() -> list[str]:
    """Names, with tags, of the models whose weights come with the package, but for the tiny one for tests."""
    return [
        name_and_tag
        for name in architectures()
        if not name.startswith("test_")
        for name_and_tag, cfg in get_arch_pretrained_cfgs(name).items()
        if cfg.file and Path(cfg.file).is_file()
    ]
