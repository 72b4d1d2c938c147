"""One training epoch."""

import argparse
import math
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Callable, ContextManager, Optional

import torch
from timm.task import ClassificationTask
from timm.utils import AverageMeter, NativeScaler, dispatch_clip_grad
from torch import Tensor

from ...data.images import readable
from .checkpoint import DivergedError
from .loaders import TrainLoader
from .rounding import rounded_weights

__all__ = ["Parts", "Update", "learning_rate", "train_epoch", "updates_per_epoch"]


@dataclass
class Parts:
    """What a training run is put together of."""

    args: argparse.Namespace
    task: ClassificationTask
    loader: TrainLoader
    optimizer: torch.optim.Optimizer
    scheduler: Any
    scaler: Optional[NativeScaler]
    autocast: Callable[[], ContextManager[Any]]
    device: torch.device

    @property
    def dtype(self) -> Optional[torch.dtype]:
        """dtype of the inputs; None leaves them as they are."""
        return getattr(torch, self.args.model_dtype) if self.args.model_dtype else None

    def weights(self, model: torch.nn.Module, training: bool = False) -> ContextManager[None]:
        """Context of the model's passes, and with `training` of an update: rounds its weights if the run is to."""
        if not self.args.round_weights:
            return nullcontext()
        return rounded_weights(model, self.optimizer if training else None)


@dataclass(frozen=True)
class Update:
    """An update of the weights that has just been done.

    Attributes:
        consumed: Batches of the epoch used so far.
        updates: Updates of the whole run so far.
        loss: Of the last batch, on this process.
        lr: Learning rate it was done with.
        samples: Samples it saw, of all processes.
    """

    consumed: int
    updates: int
    loss: float
    lr: float
    samples: int


def updates_per_epoch(parts: Parts) -> int:
    """Updates of the weights in an epoch."""
    return math.ceil(len(parts.loader) / parts.args.grad_accum_steps)


def learning_rate(optimizer: torch.optim.Optimizer) -> float:
    """Mean over the parameter groups."""
    rates = [float(group["lr"]) for group in optimizer.param_groups]
    return sum(rates) / len(rates)


def train_epoch(
    parts: Parts, epoch: int, consumed: int, losses: AverageMeter, on_update: Callable[[Update], None]
) -> float:
    """Train one epoch or the rest of one, with the operations of train.py in its order.

    Args:
        parts: The run.
        epoch: Number of the epoch, from 0.
        consumed: Batches of it that an interrupted run has used; the loader is to be at that position.
        losses: Loss of the epoch so far.
        on_update: Called after each update.

    Returns:
        The epoch's mean training loss over all processes.

    Raises:
        DivergedError: If a loss is not finite, before it gets to the weights.
    """
    args, task = parts.args, parts.task
    mixes = not (args.mixup_off_epoch and epoch >= args.mixup_off_epoch)
    parts.loader.begin(epoch, mixes)
    model = task.get_trainable_module()
    model.train()
    total = len(parts.loader)
    last_accum = total % args.grad_accum_steps
    updates = epoch * updates_per_epoch(parts) + consumed // args.grad_accum_steps
    samples = 0
    parts.optimizer.zero_grad()
    for index, (x, target) in enumerate(readable(parts.loader.batches), consumed):
        need_update = index + 1 == total or (index + 1) % args.grad_accum_steps == 0
        accum_steps = last_accum if index >= total - last_accum else args.grad_accum_steps
        x, target = _prepare(parts, x, target)
        sync = task.no_sync() if args.distributed and not need_update else nullcontext()
        with sync, parts.weights(model, training=True):
            with parts.autocast():
                loss = task(x, target)["loss"]
            if accum_steps > 1:
                loss = loss / accum_steps
            value = loss.item()
            _require_finite(value, parts, epoch, updates)
            _backward(parts, loss, need_update)
        losses.update(value * accum_steps, len(x))
        samples += len(x) * args.world_size
        if not need_update:
            continue
        updates += 1
        parts.optimizer.zero_grad()
        task.update_ema(step=updates)
        if args.synchronize_step and parts.device.type == "cuda":
            torch.cuda.synchronize()
        lr = learning_rate(parts.optimizer)
        if parts.scheduler is not None:
            parts.scheduler.step_update(num_updates=updates, metric=losses.avg)
        on_update(Update(index + 1, updates, value * accum_steps, lr, samples))
        samples = 0
    if hasattr(parts.optimizer, "sync_lookahead"):
        parts.optimizer.sync_lookahead()
    return _mean_over_processes(losses.avg, parts)


def _prepare(parts: Parts, x: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    if not parts.loader.on_device:
        x, target = x.to(device=parts.device, dtype=parts.dtype), target.to(device=parts.device)
        if parts.loader.mixup is not None:
            x, target = parts.loader.mixup(x, target)
    if parts.args.channels_last and x.ndim == 4:
        x = x.contiguous(memory_format=torch.channels_last)
    return x, target


def _require_finite(loss: float, parts: Parts, epoch: int, updates: int) -> None:
    finite = math.isfinite(loss)
    if parts.args.distributed:
        # All processes stop together.
        bad = torch.tensor([not finite], dtype=torch.float32, device=parts.device)
        torch.distributed.all_reduce(bad)
        finite = not bool(bad)
    if not finite:
        lr = learning_rate(parts.optimizer)
        what = "not finite on another process" if math.isfinite(loss) else str(loss)
        raise DivergedError(f"the loss is {what} at step {updates} (epoch {epoch}, learning rate {lr:.3g})")


def _backward(parts: Parts, loss: Tensor, need_update: bool) -> None:
    args = parts.args
    second_order = getattr(parts.optimizer, "is_second_order", False)
    clipped = None
    if args.clip_grad is not None:
        clipped = parts.task.get_clip_parameters(exclude_head="agc" in args.clip_mode)
    if parts.scaler is not None:
        parts.scaler(
            loss,
            parts.optimizer,
            clip_grad=args.clip_grad,
            clip_mode=args.clip_mode,
            parameters=clipped,
            create_graph=second_order,
            need_update=need_update,
        )
        return
    loss.backward(create_graph=second_order)
    if need_update:
        if args.clip_grad is not None:
            dispatch_clip_grad(clipped, value=args.clip_grad, mode=args.clip_mode)
        parts.optimizer.step()


def _mean_over_processes(value: float, parts: Parts) -> float:
    if not parts.args.distributed:
        return value
    total = torch.tensor([value], dtype=torch.float32, device=parts.device)
    torch.distributed.all_reduce(total)
    return float(total) / parts.args.world_size
