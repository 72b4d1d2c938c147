"""Where a run is, and how a checkpoint holds it: epoch, position in it, random numbers, history."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from timm.utils import AverageMeter

from ... import execution
from .checkpoint import schedule_state
from .contents import loading
from .loop import Parts


@dataclass
class RunState:
    """Where the run is.

    Attributes:
        epoch: Epochs that are finished.
        consumed: Batches of the current epoch that are done.
        losses: Loss of the current epoch so far.
        history: Rows of summary.csv.
        eval_began: Whether a validation has begun, ever.
        trained: Row of an epoch whose updates are done and whose validation is not.
    """

    epoch: int = 0
    consumed: int = 0
    losses: AverageMeter = field(default_factory=AverageMeter)
    history: list[dict[str, Any]] = field(default_factory=list)
    eval_began: bool = False
    trained: dict[str, Any] | None = None


def batches_of(parts: Parts) -> list[int]:
    """What a position within an epoch is counted in."""
    settings = parts.settings
    return [len(parts.loader), settings.batch_size, settings.grad_accum_steps, parts.processes.world_size]


def state_to_save(parts: Parts, state: RunState, consumed: int, **facts: Any) -> dict[str, Any]:
    """A checkpoint's entry "trainer"; every process has to call this.

    Args:
        parts: The run.
        state: Where it is.
        consumed: Batches of the epoch that are done, all if `state.trained` is set; 0 between epochs.
        facts: What else the checkpoint is to say.
    """
    within = 0 if state.trained is not None else consumed
    own = {
        "position": parts.loader.replayable.position(within),
        "fusion": execution.state_dict(),
        "losses": {"sum": state.losses.sum, "count": state.losses.count},
        "optimizer": None if (generator := _generator(parts)) is None else generator.get_state(),
    }
    return {
        "epoch": state.epoch,
        "consumed": consumed,
        "trained": state.trained,
        "batches": batches_of(parts),
        "processes": parts.processes.of_all(own),
        "eval_began": state.eval_began,
        "history": state.history,
        "schedule": schedule_state(parts.scheduler),
        "written": time.time(),
        **facts,
    }


def resume_state(parts: Parts, trainer: Mapping[str, Any], path: Path, eval_loader: Any) -> tuple[RunState, list[str]]:
    """The state that `state_to_save` gave, with loaders and random numbers set to it; and what is not the same.

    ValueError if the batches of the interrupted epoch are others.
    """
    settings, processes = parts.settings, parts.processes
    notes: list[str] = []
    state = RunState(trainer["epoch"], trainer["consumed"], history=[dict(row) for row in trainer["history"]])
    if settings.start_epoch is not None:
        state.history = [row for row in state.history if row["epoch"] < settings.start_epoch]
        return state, notes
    if trainer.get("trained") is not None:
        state.trained, state.consumed = dict(trainer["trained"]), 0
    if state.consumed and trainer["batches"] != batches_of(parts):
        raise ValueError(
            f"checkpoint {path} is from within an epoch; [batches, batch_size, grad_accum_steps, processes] were "
            f"{trainer['batches']} and are {batches_of(parts)}. Resume with the same, or from last.pth.tar"
        )
    if len(trainer["processes"]) != processes.world_size:
        notes.append(f"{processes.world_size} processes instead of {len(trainer['processes'])}: new random numbers")
        return state, notes
    own = trainer["processes"][processes.rank]
    state.losses.sum, state.losses.count = own["losses"]["sum"], own["losses"]["count"]
    state.losses.avg = state.losses.sum / max(1, state.losses.count)
    with loading(path, "position in the epoch"):
        execution.load_state_dict(own["fusion"])
        generator = _generator(parts)
        if generator is not None and own.get("optimizer") is not None:
            generator.set_state(own["optimizer"])
        parts.loader.replayable.resume(own["position"])
    state.eval_began = trainer["eval_began"]
    if state.eval_began and eval_loader is not None:
        loader = getattr(eval_loader, "loader", eval_loader)
        if loader.num_workers and loader.persistent_workers:
            # Their seed was drawn once: see ReplayableLoader.resume.
            loader.generator = torch.Generator()
    return state, notes


def _generator(parts: Parts) -> torch.Generator | None:
    """An optimizer's own random numbers (adahessian)."""
    optimizer = getattr(parts.optimizer, "_base_optimizer", parts.optimizer)
    generator: torch.Generator | None = getattr(optimizer, "generator", None)
    return generator
