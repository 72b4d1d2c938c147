"""The model, its task and what it is compared by."""

import argparse
import difflib
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, Callable, ContextManager

import timm
import torch
from timm.data import resolve_data_config
from timm.layers import set_fast_norm
from timm.loss import BinaryCrossEntropy, LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.models import load_checkpoint
from timm.task import ClassificationTask
from torch import nn

from ..._errors import first_line, naming_settings
from ...models._hst import HierarchicalSpikingTransformer
from .datasets import is_events
from .settings import mixes
from .sync_bn import synchronize_batch_norm

__all__ = ["autocast", "build_model", "build_task", "compiling", "data_config", "describe_misfit", "load_weights"]


def build_model(args: argparse.Namespace) -> nn.Module:
    """Create the model as train.py does, drawing the same random numbers; fill in `args.num_classes`.

    Raises:
        ValueError: If the model or one of its arguments is unknown, or a checkpoint is of another model.
        FileNotFoundError: If a checkpoint is not there.
    """
    if ":" not in args.model and not timm.is_model(args.model):  # local-dir:FOLDER and hf-hub:REPOSITORY say where
        close = difflib.get_close_matches(args.model, timm.list_models(), n=3)
        hint = f"; did you mean {' or '.join(close)}?" if close else ""
        raise ValueError(f"model {args.model!r} is unknown{hint}")
    for name in ("initial_checkpoint", "pretrained_path"):
        path = getattr(args, name, None)
        if path and not Path(path).is_file():
            raise FileNotFoundError(f"{name}: there is no file {path}")
    if getattr(args, "fast_norm", False):
        set_fast_norm()
    overlay = {}
    if getattr(args, "pretrained_path", None):
        overlay["pretrained_cfg_overlay"] = {"file": args.pretrained_path, "num_classes": -1}  # -1: a new classifier
    try:
        model: nn.Module = timm.create_model(
            args.model,
            pretrained=args.pretrained,
            in_chans=in_channels(args),
            num_classes=args.num_classes,
            drop_rate=getattr(args, "drop", 0.0),
            drop_path_rate=getattr(args, "drop_path", None),
            drop_block_rate=getattr(args, "drop_block", None),
            global_pool=args.gp,
            bn_momentum=getattr(args, "bn_momentum", None),
            bn_eps=getattr(args, "bn_eps", None),
            **overlay,
            **args.model_kwargs,
        )
    except (AssertionError, LookupError, NotImplementedError, TypeError) as error:
        raise ValueError(f"model {args.model} does not take these arguments: {error}") from error
    if getattr(args, "round_weights", False) and not isinstance(model, HierarchicalSpikingTransformer):
        kind = type(model).__name__
        raise ValueError(f"round_weights=True: model {args.model} is a {kind}, expected a QKFormer or MaxFormer")
    if getattr(args, "initial_checkpoint", ""):
        load_weights(model, args.initial_checkpoint, args.model)
    if args.num_classes is None:
        args.num_classes = model.num_classes
    _initialize_head(model, getattr(args, "head_init_scale", None), getattr(args, "head_init_bias", None))
    if getattr(args, "grad_checkpointing", False):
        model.set_grad_checkpointing(enable=True)  # type: ignore[operator]
    return model


def _initialize_head(model: nn.Module, scale: float | None, bias: float | None) -> None:
    head: Any = model.get_classifier()  # type: ignore[operator]
    with torch.no_grad():
        if scale is not None:
            head.weight.mul_(scale)
            head.bias.mul_(scale)
        if bias is not None:
            head.bias.fill_(bias)


def load_weights(model: nn.Module, path: str, name: str, use_ema: bool = True) -> None:
    """Load the weights of a checkpoint, those of the moving average if it has them.

    Raises:
        ValueError: If they are not this model's, or the file is no checkpoint.
    """
    try:
        load_checkpoint(model, path, use_ema=use_ema)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"there is no checkpoint {path}") from error
    except RuntimeError as error:
        from timm.models import load_state_dict

        try:
            misfit = describe_misfit(model, load_state_dict(path, use_ema=use_ema))
        except Exception:
            raise ValueError(f"{path} cannot be read as a checkpoint: {first_line(error)}") from error
        raise ValueError(f"checkpoint {path} does not fit the model {name}: {misfit}") from error


def describe_misfit(model: nn.Module, weights: dict[str, Any]) -> str:
    """How weights differ from a model's, in one line; "" if they do not."""
    own = model.state_dict()
    parts = []
    if missing := [name for name in own if name not in weights]:
        parts.append(f"it lacks {len(missing)} tensors ({missing[0]}, ...)")
    if extra := [name for name in weights if name not in own]:
        parts.append(f"it has {len(extra)} others ({extra[0]}, ...)")
    shared = [name for name in own if name in weights]
    if wrong := [name for name in shared if own[name].shape != weights[name].shape]:
        shapes = [list(tensors[wrong[0]].shape) for tensors in (weights, own)]
        parts.append(f"{len(wrong)} have another shape ({wrong[0]}: {shapes[0]} instead of {shapes[1]})")
    return ", ".join(parts)


def in_channels(args: argparse.Namespace) -> int:
    """Channels of the model's input, as train.py decides; clips of events have 2."""
    if args.in_chans is not None:
        return int(args.in_chans)
    if args.input_size is not None:
        return int(args.input_size[0])
    return 2 if is_events(args) else 3


def data_config(args: argparse.Namespace, model: nn.Module) -> dict[str, Any]:
    """timm's data config of a model and the settings.

    Raises:
        ValueError: If mean or std do not go with the channels.
    """
    try:
        config: dict[str, Any] = resolve_data_config(vars(args), model=model)
    except AssertionError:
        raise ValueError(f"mean={args.mean} and std={args.std} need one value, or one for each channel") from None
    if config["input_size"][0] != in_channels(args):
        config["input_size"] = (in_channels(args), *config["input_size"][1:])
    return config


def build_task(args: argparse.Namespace, model: nn.Module) -> ClassificationTask:
    """Move the model to its device and put it into a task with its loss, as train.py does."""
    device = torch.device(args.device)
    dtype = getattr(torch, args.model_dtype) if args.model_dtype else None
    model.to(device=device, dtype=dtype)
    if args.channels_last:
        model.to(memory_format=torch.channels_last)
    if args.distributed and args.sync_bn:
        args.dist_bn = ""
        model = synchronize_batch_norm(model, device)
    return ClassificationTask(model=model, criterion=_loss(args), device=device, dtype=dtype, verbose=False)


def _loss(args: argparse.Namespace) -> nn.Module:
    if args.bce_loss:
        return BinaryCrossEntropy(
            smoothing=0.0 if mixes(args) else args.smoothing,
            target_threshold=args.bce_target_thresh,
            sum_classes=args.bce_sum,
            pos_weight=args.bce_pos_weight,
        )
    if mixes(args):
        return SoftTargetCrossEntropy()  # the mixed targets are smooth already
    return LabelSmoothingCrossEntropy(smoothing=args.smoothing) if args.smoothing else nn.CrossEntropyLoss()


@contextmanager
def compiling(args: argparse.Namespace) -> Iterator[None]:
    """Where torch.compile is asked for a backend and a mode.

    Raises:
        ValueError: If it has no such backend or mode.
    """
    known = torch.compiler.list_backends(exclude_tags=())
    if args.torchcompile not in known:
        raise ValueError(f"torchcompile={args.torchcompile!r} is unknown, torch has {', '.join(known)}")
    with naming_settings("a compiled model", {"torchcompile_mode": args.torchcompile_mode}):
        yield


def autocast(args: argparse.Namespace) -> Callable[[], ContextManager[Any]]:
    """Factory of the context that a forward pass runs in."""
    if not args.amp:
        return nullcontext
    return partial(torch.autocast, device_type=torch.device(args.device).type, dtype=getattr(torch, args.amp_dtype))
