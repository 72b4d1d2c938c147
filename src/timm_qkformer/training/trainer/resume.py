"""An optimizer that goes on from a checkpoint, with the settings of now."""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from .checkpoint import settings_in

__all__ = ["check_optimizer", "take_up_optimizer"]

# Of a parameter group, what the command line sets and no optimizer changes. A schedule sets the learning rate.
_SETTINGS = ("weight_decay", "momentum", "betas", "eps", "lr_scale")
_RATES = ("lr", "initial_lr")


def check_optimizer(content: Mapping[str, Any], path: Path, args: argparse.Namespace) -> None:
    """Refuse a checkpoint whose optimizer cannot go on, unless only its weights are wanted.

    Raises:
        ValueError: If it has no optimizer's state, or another optimizer's.
    """
    if args.no_resume_opt:
        return
    if "optimizer" not in content:
        raise ValueError(
            f"checkpoint {path} has no state of an optimizer; --initial-checkpoint starts from its weights, "
            f"--no-resume-opt goes on with a new optimizer"
        )
    opt = settings_in(content).get("opt", args.opt)
    if opt.lower() != args.opt.lower():
        raise ValueError(
            f"checkpoint {path} has the state of the optimizer {opt}, this run's opt is {args.opt}; --no-resume-opt "
            f"goes on with a new one"
        )


def take_up_optimizer(
    optimizer: torch.optim.Optimizer, content: Mapping[str, Any], path: Path, args: argparse.Namespace, follows: bool
) -> None:
    """Load an optimizer's state; what is set on the command line stays as it is in `optimizer`.

    Args:
        optimizer: New, with this run's settings.
        content: The checkpoint, looked at by `check_optimizer`.
        path: Where it is from.
        args: Settings.
        follows: Whether the learning rate is part of the state, as with a schedule that follows the metric.

    Raises:
        ValueError: If the state is of other parameters.
    """
    names = {*_SETTINGS, *args.opt_kwargs, *(() if follows else _RATES)}
    own = [{name: group[name] for name in names & group.keys()} for group in optimizer.param_groups]
    try:
        optimizer.load_state_dict(content["optimizer"])
    except (KeyError, ValueError) as error:
        raise ValueError(
            f"checkpoint {path}: the optimizer's state is of other parameters ({error}); --no-resume-opt goes on with "
            f"a new optimizer"
        ) from error
    for group, settings in zip(optimizer.param_groups, own, strict=True):
        group.update(settings)
