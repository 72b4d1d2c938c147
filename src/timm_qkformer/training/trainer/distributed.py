"""The group of processes."""

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from timm.utils import init_distributed_device

__all__ = ["from_primary", "of_all", "processes"]


@contextmanager
def processes(args: argparse.Namespace) -> Iterator[torch.device]:
    """Join the group that torchrun started, if it did; fills in train.py's `device`, `rank`, `world_size`, ...

    Raises:
        ValueError: If the device is not there.
    """
    kind = args.device.partition(":")[0]
    if kind == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device={args.device!r} is not available here; --device cpu is")
    try:
        device = init_distributed_device(args)
    except RuntimeError as error:
        raise ValueError(f"device={args.device!r} cannot be used: {str(error).splitlines()[0]}") from error
    try:
        yield device
    finally:
        if args.distributed:
            torch.distributed.destroy_process_group()


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
