"""The model, its task, and the contexts that they run in."""

import difflib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import resolve_data_config
from timm.layers import set_fast_norm
from timm.loss import BinaryCrossEntropy, LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.models import load_checkpoint, load_state_dict
from timm.task import TrainingTask
from torch import nn

from ...errors import first_line, naming_settings
from ...hub.folder import check_folder
from ...models.aliases import current_name
from ...models.loading import check_tag
from ...torch_files import DamagedFileError, check_file, namespaces_allowed
from .distill import distillation_task, teacher_settings
from .distributed import Processes, synchronize_batch_norm
from .quantize import quantized_weights, require_quantizable
from .settings import Settings
from .steps import StepsTask, check_steps
from .task import ModelTask, require_compilable


def build_model(settings: Settings) -> nn.Module:
    """Create the model as train.py does, drawing the same random numbers.

    ValueError if it or an argument is unknown or a checkpoint is another model's; FileNotFoundError for no checkpoint.
    """
    # local-dir:FOLDER and hf-hub:REPOSITORY say where the model is.
    if ":" not in settings.model and not timm.is_model(settings.model):
        close = difflib.get_close_matches(settings.model, timm.list_models(), n=3)
        hint = f"; did you mean {' or '.join(close)}?" if close else ""
        if Path(settings.model).is_file():
            hint = ": it is a file; name its model, and the file with --checkpoint (to train on: --initial-checkpoint)"
        raise ValueError(f"model {settings.model!r} is unknown{hint}")
    check_tag(current_name(settings.model))
    if settings.model.startswith("local-dir:"):
        check_folder(Path(settings.model.removeprefix("local-dir:")))
    for name in ("initial_checkpoint", "pretrained_path"):
        path = getattr(settings, name)
        if path and not Path(path).is_file():
            raise FileNotFoundError(f"{name}: there is no file {path}")
    if settings.fast_norm:
        set_fast_norm()
    overlay = {}
    if settings.pretrained_path:
        # -1: a new classifier
        overlay["pretrained_cfg_overlay"] = {"file": settings.pretrained_path, "num_classes": -1}
    try:
        model: nn.Module = timm.create_model(
            current_name(settings.model),
            pretrained=settings.pretrained,
            in_chans=settings.channels,
            num_classes=settings.num_classes,
            drop_rate=settings.drop,
            drop_path_rate=settings.drop_path,
            drop_block_rate=settings.drop_block,
            global_pool=settings.gp,
            bn_momentum=settings.bn_momentum,
            bn_eps=settings.bn_eps,
            **overlay,
            **settings.model_kwargs,
        )
    except (
        ArithmeticError,
        AssertionError,
        AttributeError,
        LookupError,
        MemoryError,
        RuntimeError,
        TypeError,
    ) as error:
        if isinstance(error, OSError):  # of pretrained weights
            raise
        raise ValueError(f"model {settings.model} does not take these arguments: {error}") from error
    if settings.quantize_weights:
        require_quantizable(model, settings.model)
    if settings.initial_checkpoint:
        load_weights(model, settings.initial_checkpoint, settings.model)
    _initialize_head(model, settings.head_init_scale, settings.head_init_bias)
    _freeze(model, settings.freeze or ())
    if settings.grad_checkpointing:
        model.set_grad_checkpointing(enable=True)  # type: ignore[operator]
    return model


def _freeze(model: nn.Module, names: Sequence[str]) -> None:
    for name in names:
        parameters = [p for own, p in model.named_parameters() if own == name or own.startswith(f"{name}.")]
        if not parameters:
            known = [child for child, _ in model.named_children()]
            raise ValueError(f"freeze={name!r} names no parameters; the model's modules are {', '.join(known)}")
        for parameter in parameters:
            parameter.requires_grad_(False)
    if names and not any(p.requires_grad for p in model.parameters()):
        raise ValueError(f"freeze={list(names)} leaves nothing to train")


def train_mode(model: nn.Module, frozen: Sequence[str]) -> None:
    """Set a model to train, but for its frozen modules, whose batch norms keep their statistics."""
    model.train()
    for name, module in model.named_modules():
        own = name.replace("_orig_mod.", "").removeprefix("module.")  # of compiled and distributed models
        if own in frozen:
            module.eval()


def _initialize_head(model: nn.Module, scale: float | None, bias: float | None) -> None:
    head: Any = model.get_classifier()  # type: ignore[operator]
    with torch.no_grad():
        if scale is not None:
            head.weight.mul_(scale)
            head.bias.mul_(scale)
        if bias is not None:
            head.bias.fill_(bias)


def load_weights(model: nn.Module, path: str, name: str, use_ema: bool = True) -> None:
    """Load a checkpoint's weights, the moving average if it has one; ValueError if it is none or not this model's."""
    try:
        check_file(Path(path))
        with namespaces_allowed():
            load_checkpoint(model, path, use_ema=use_ema)
    except DamagedFileError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    except (AttributeError, LookupError, RuntimeError, TypeError) as error:
        try:
            with namespaces_allowed():
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


def data_config(settings: Settings, model: nn.Module) -> dict[str, Any]:
    """timm's data config of a model and the settings; ValueError if mean or std do not go with the channels."""
    try:
        config: dict[str, Any] = resolve_data_config(vars(settings), model=model)
    except AssertionError:
        raise ValueError(
            f"mean={settings.mean} and std={settings.std} need one value, or one for each channel"
        ) from None
    if config["input_size"][0] != settings.channels:
        config["input_size"] = (settings.channels, *config["input_size"][1:])
    return config


def model_dtype(settings: Settings) -> torch.dtype | None:
    """dtype of the model and its inputs; None leaves them as they are."""
    return getattr(torch, settings.model_dtype) if settings.model_dtype else None


def to_device(settings: Settings, model: nn.Module, device: torch.device) -> None:
    """Move a model to its device, dtype and memory format."""
    model.to(device=device, dtype=model_dtype(settings))
    if settings.channels_last:
        model.to(memory_format=torch.channels_last)


def build_task(settings: Settings, processes: Processes, model: nn.Module) -> TrainingTask:
    """Move the model to its device and put it into a task with its loss, as train.py does."""
    device = processes.device
    check_steps(settings, model)
    to_device(settings, model, device)
    if processes.distributed and settings.sync_bn:
        model = synchronize_batch_norm(model, device)
    if settings.torchcompile:
        require_compilable(model)
    criterion = _loss(settings).to(device)
    common: dict[str, Any] = {
        "criterion": criterion, "device": device, "dtype": model_dtype(settings), "verbose": False
    }  # fmt: skip
    if settings.kd_model_name:
        teacher = build_model(teacher_settings(settings))
        to_device(settings, teacher, device)
        return distillation_task(settings, model, teacher, data_config(settings, model), common)
    if settings.tet:
        return StepsTask(settings.tet, settings.tet_lambda, model=model, **common)
    return ModelTask(model=model, **common)


def _loss(settings: Settings) -> nn.Module:
    if settings.bce_loss:
        return BinaryCrossEntropy(
            smoothing=0.0 if settings.uses_mixup else settings.smoothing,
            target_threshold=settings.bce_target_thresh,
            sum_classes=settings.bce_sum,
            pos_weight=settings.bce_pos_weight,
        )
    if settings.class_weights is not None:
        if len(settings.class_weights) != settings.num_classes:
            raise ValueError(
                f"class_weights are {len(settings.class_weights)}, the model has num_classes={settings.num_classes}"
            )
        # Targets after mixup are smooth already.
        smoothing = 0.0 if settings.uses_mixup else settings.smoothing
        return nn.CrossEntropyLoss(torch.tensor(settings.class_weights), label_smoothing=smoothing)
    if settings.uses_mixup:
        return SoftTargetCrossEntropy()  # targets after mixup are smooth already
    return LabelSmoothingCrossEntropy(smoothing=settings.smoothing) if settings.smoothing else nn.CrossEntropyLoss()


@contextmanager
def compiling(settings: Settings) -> Iterator[None]:
    """Where torch.compile is asked for a backend and a mode; ValueError if it has no such backend or mode."""
    known = torch.compiler.list_backends(exclude_tags=())
    if settings.torchcompile not in known:
        raise ValueError(f"torchcompile={settings.torchcompile!r} is unknown, torch has {', '.join(known)}")
    with naming_settings("a compiled model", {"torchcompile_mode": settings.torchcompile_mode}):
        yield


def autocast(settings: Settings, device: torch.device) -> Callable[[], AbstractContextManager[Any]]:
    """Factory of the context that a forward pass runs in."""
    if not settings.amp:
        return nullcontext
    return partial(torch.autocast, device_type=device.type, dtype=getattr(torch, settings.amp_dtype))


def forward_weights(
    settings: Settings, model: nn.Module, optimizer: torch.optim.Optimizer | None = None
) -> AbstractContextManager[None]:
    """Context of the model's passes, and with an optimizer of an update: quantizes its weights if the run is to."""
    return quantized_weights(model, optimizer) if settings.quantize_weights else nullcontext()
