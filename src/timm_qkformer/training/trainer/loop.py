"""One training epoch."""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from timm.task import TrainingTask
from timm.utils import AverageMeter, NativeScaler, dispatch_clip_grad
from torch import Tensor

from ...data.images import readable
from ...execution import execution_policy
from .checkpoint import DivergedError
from .data import TrainLoader
from .distributed import Processes
from .muon import muon_precision
from .network import forward_weights, model_dtype, train_mode
from .settings import Settings
from .sparsity import FiringRatePenalty
from .steps import drawn_time_steps, shown_for


@dataclass(frozen=True)
class Parts:
    """What a training run is put together of."""

    settings: Settings
    processes: Processes
    task: TrainingTask
    loader: TrainLoader
    optimizer: torch.optim.Optimizer
    scheduler: Any
    scaler: NativeScaler | None
    autocast: Callable[[], AbstractContextManager[Any]]
    penalty: FiringRatePenalty | None = None

    @property
    def updates_per_epoch(self) -> int:
        """Updates of the weights in an epoch."""
        return math.ceil(len(self.loader) / self.settings.grad_accum_steps)

    def updates(self, epoch: int, consumed: int) -> int:
        """Updates of the whole run so far, after so many batches of an epoch."""
        return epoch * self.updates_per_epoch + consumed // self.settings.grad_accum_steps


@dataclass(frozen=True)
class Update:
    """An update of the weights that has just been done."""

    consumed: int  # batches of the epoch so far
    updates: int  # of the whole run so far
    loss: float  # of the last batch, on this process
    lr: float  # that it was done with
    samples: int  # that it saw, of all processes


def learning_rate(optimizer: torch.optim.Optimizer) -> float:
    """Mean over the parameter groups."""
    rates = [float(group["lr"]) for group in optimizer.param_groups]
    return sum(rates) / len(rates)


def train_epoch(
    parts: Parts, epoch: int, consumed: int, losses: AverageMeter, on_update: Callable[[Update], None]
) -> float:
    """Train an epoch or the rest of one, with train.py's operations in its order; its mean loss over all processes.

    Args:
        parts: The run.
        epoch: Number of the epoch, from 0.
        consumed: Batches of it that an interrupted run has used; the loader is to be at that position.
        losses: Loss of the epoch so far.
        on_update: Called after each update.

    Raises:
        DivergedError: If a loss is not finite, before it gets to the weights.
    """
    twice = execution_policy(packed=False) if needs_second_derivatives(parts.optimizer) else nullcontext()
    with twice, muon_precision(parts.processes.device):
        return _train_epoch(parts, epoch, consumed, losses, on_update)


def needs_second_derivatives(optimizer: torch.optim.Optimizer) -> bool:
    """Whether an optimizer differentiates gradients (adahessian), which packed activations have no formula for."""
    return bool(getattr(optimizer, "is_second_order", False))


def _train_epoch(
    parts: Parts, epoch: int, consumed: int, losses: AverageMeter, on_update: Callable[[Update], None]
) -> float:
    settings, processes, task = parts.settings, parts.processes, parts.task
    parts.loader.begin(epoch, mixup=not (settings.mixup_off_epoch and epoch >= settings.mixup_off_epoch))
    model = task.get_trainable_module()
    train_mode(model, settings.freeze or ())
    total = len(parts.loader)
    last_accum = total % settings.grad_accum_steps
    updates = parts.updates(epoch, consumed)
    samples = 0
    parts.optimizer.zero_grad()
    for index, (x, target) in enumerate(readable(parts.loader.batches), consumed):
        need_update = index + 1 == total or (index + 1) % settings.grad_accum_steps == 0
        accum_steps = last_accum if index >= total - last_accum else settings.grad_accum_steps
        x, target = _prepare(parts, x, target)
        steps = drawn_time_steps(settings, epoch, index)
        sync = task.no_sync() if processes.distributed and not need_update else nullcontext()
        with sync, forward_weights(settings, model, parts.optimizer):
            with parts.autocast(), shown_for(model, x, steps) as shown:
                loss = task(shown, target)["loss"]
            if parts.penalty is not None:
                loss = loss + parts.penalty.take()
            if accum_steps > 1:
                loss = loss / accum_steps
            value = loss.item()
            _require_finite(value, parts, epoch, updates)
            _backward(parts, loss, need_update)
        losses.update(value * accum_steps, len(x))
        samples += len(x) * processes.world_size
        if not need_update:
            continue
        updates += 1
        parts.optimizer.zero_grad()
        task.update_ema(step=updates)
        if settings.synchronize_step and processes.device.type == "cuda":
            torch.cuda.synchronize()
        lr = learning_rate(parts.optimizer)
        if parts.scheduler is not None:
            parts.scheduler.step_update(num_updates=updates, metric=losses.avg)
        on_update(Update(index + 1, updates, value * accum_steps, lr, samples))
        samples = 0
    if hasattr(parts.optimizer, "sync_lookahead"):
        parts.optimizer.sync_lookahead()
    return processes.sum(losses.avg) / processes.world_size


def _prepare(parts: Parts, x: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    device = parts.processes.device
    if not parts.loader.on_device:
        x, target = x.to(device=device, dtype=model_dtype(parts.settings)), target.to(device=device)
        if parts.loader.mixup is not None:
            x, target = parts.loader.mixup(x, target)
    if parts.settings.channels_last and x.ndim == 4:
        x = x.contiguous(memory_format=torch.channels_last)
    return x, target


def _require_finite(loss: float, parts: Parts, epoch: int, updates: int) -> None:
    if parts.processes.sum(float(not math.isfinite(loss))):  # all processes stop together
        lr = learning_rate(parts.optimizer)
        what = "not finite on another process" if math.isfinite(loss) else str(loss)
        raise DivergedError(f"the loss is {what} at step {updates} (epoch {epoch}, learning rate {lr:.3g})")


def _backward(parts: Parts, loss: Tensor, need_update: bool) -> None:
    settings = parts.settings
    second_order = needs_second_derivatives(parts.optimizer)
    clipped = None
    if settings.clip_grad is not None:
        clipped = parts.task.get_clip_parameters(exclude_head="agc" in settings.clip_mode)
    if parts.scaler is not None:
        parts.scaler(
            loss,
            parts.optimizer,
            clip_grad=settings.clip_grad,
            clip_mode=settings.clip_mode,
            parameters=clipped,
            create_graph=second_order,
            need_update=need_update,
        )
        return
    loss.backward(create_graph=second_order)
    if need_update:
        if settings.clip_grad is not None:
            dispatch_clip_grad(clipped, value=settings.clip_grad, mode=settings.clip_mode)
        parts.optimizer.step()
