"""The group of processes."""

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from timm.utils import init_distributed_device

from ..._errors import first_line

__all__ = ["from_primary", "of_all", "processes", "usable_device"]


@contextmanager
def processes(args: argparse.Namespace) -> Iterator[torch.device]:
    """Join the group that torchrun started, if it did; fills in train.py's `device`, `rank`, `world_size`, ...

    Raises:
        ValueError: If the device is not there.
    """
    wanted = args.device
    _require_cuda(wanted)
    try:
        init_distributed_device(args)
    except RuntimeError as error:
        raise ValueError(f"device={wanted!r} cannot be used: {first_line(error)}") from error
    try:
        yield usable_device(args.device)
    finally:
        if args.distributed:
            torch.distributed.destroy_process_group()


def usable_device(name: str) -> torch.device:
    """The device of this name.

    Raises:
        ValueError: If it is not there.
    """
    _require_cuda(name)
    try:
        torch.empty(1, device=name)
    except (AssertionError, NotImplementedError, RuntimeError) as error:
        raise ValueError(f"device={name!r} cannot be used: {first_line(error)}") from error
    return torch.device(name)


def _require_cuda(name: str) -> None:
    if name.partition(":")[0] == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device={name!r} is not available here; --device cpu is")


def from_primary(args: argparse.Namespace, value: Any) -> Any:
    """Process 0's value, in every process."""
    if not args.distributed:
        return value
    values = [value]
    torch.distributed.broadcast_object_list(values, src=0)
    return values[0]


def of_all(args: argparse.Namespace, value: Any) -> list[Any]:
    """Every process's value, by rank, in every process."""
    if not args.distributed:
        return [value]
    values = [None] * args.world_size
    torch.distributed.all_gather_object(values, value)
    return values
