"""The state of timm's learning rate schedules."""

from collections.abc import Mapping
from typing import Any, Optional

__all__ = ["schedule_state", "take_up_schedule"]


def schedule_state(scheduler: Any) -> Optional[dict[str, Any]]:
    """What a schedule (or None) has to remember: nothing, but for `plateau`, which follows the metric."""
    plateau = getattr(scheduler, "lr_scheduler", None)
    if plateau is None:
        return None
    return {
        "timm": scheduler.state_dict(),
        "num_bad_epochs": plateau.num_bad_epochs,
        "cooldown_counter": plateau.cooldown_counter,
        "restore_lr": scheduler.restore_lr,
    }


def take_up_schedule(scheduler: Any, state: Optional[Mapping[str, Any]], epoch: int, updates: int) -> None:
    """Set the learning rate where a run starts or goes on.

    Args:
        scheduler: timm's, new, or None for a learning rate that stays; on an optimizer whose state has been loaded.
        state: What `schedule_state` gave; None if it is not known.
        epoch: The epoch that goes on or comes next.
        updates: Updates that have been done.
    """
    if scheduler is None:
        return
    plateau = getattr(scheduler, "lr_scheduler", None)
    if plateau is not None:
        if state is not None:
            scheduler.load_state_dict(state["timm"])
            plateau.num_bad_epochs = state["num_bad_epochs"]
            plateau.cooldown_counter = state["cooldown_counter"]
            scheduler.restore_lr = state["restore_lr"]
    elif scheduler.t_in_epochs:
        # In epoch 0 the rate is the optimizer's own, which the schedule's formula may miss by a rounding.
        if epoch > 0:
            scheduler.step(epoch)
    elif updates > 0:
        scheduler.step_update(updates)
