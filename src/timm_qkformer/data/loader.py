"""Batches of event clips."""

from typing import Any

import torch
from timm.data.distributed_sampler import OrderedDistributedSampler
from torch.utils.data import DataLoader, Dataset, Sampler

from .sampling import SharedRandomSampler


class EventLoader(DataLoader):
    """A DataLoader whose order and workers' seeds follow from (seed, epoch, rank) alone, see `create_event_loader`."""

    def __init__(self, dataset: Dataset, *, seed: int, rank: int = 0, **kwargs: Any) -> None:
        self.seed = seed
        self.rank = rank
        super().__init__(dataset, generator=torch.Generator(), **kwargs)
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Say which epoch comes next: the same epoch gives the same batches, in a resumed run too."""
        if isinstance(self.sampler, SharedRandomSampler):
            self.sampler.draw_seed = lambda: _mixed(self.seed, epoch, 0)
        assert self.generator is not None
        self.generator.manual_seed(_mixed(self.seed, epoch, self.rank))


def _mixed(seed: int, epoch: int, rank: int) -> int:
    # Large odd factors keep (seed, epoch, rank) and (seed + 1, epoch - 1, rank) and the like apart.
    return (seed * 0x9E3779B1 + epoch * 0x85EBCA77 + rank * 0xC2B2AE3D) % 2**63


def create_event_loader(
    dataset: Dataset,
    batch_size: int,
    is_training: bool = False,
    seed: int = 42,
    num_workers: int = 1,
    distributed: bool = False,
    pin_memory: bool = False,
) -> EventLoader:
    """Create a loader of clips [B, T, 2, H, W] and targets [B], float32 and int64.

    Training shuffles and drops the last, smaller batch; evaluation does neither. The order and, through torch, each
    worker's seeds of torch, numpy and random follow from `seed` and the epoch: call `loader.set_epoch(epoch)` before
    each one, then an epoch is the same whether or not the run was interrupted before it. With num_workers=0 the
    augmentation runs in this process and draws from its global random numbers.

    Args:
        dataset: Gives (clip [T, 2, H, W], target), such as `EventDataset`.
        batch_size: B, of each process.
        is_training: Shuffle and drop the last batch.
        seed: The same in all processes.
        num_workers: Processes that load.
        distributed: Each process of the torch.distributed group loads its part: in training together what one process
            with a batch that many times as large would. In evaluation the parts may repeat a few samples to be of one
            length; `loader.sampler.num_valid_samples`, as timm's samplers have it, says how many count.
        pin_memory: Copy batches to page-locked memory, for a GPU.

    Raises:
        ValueError: If there is not one full batch to train on.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} needs to be at least 1")
    sampler: Sampler | None = None
    rank, world_size = 0, 1
    if distributed:
        rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    size = share = len(dataset)  # type: ignore[arg-type]
    if is_training:
        sampler = SharedRandomSampler(size, lambda: seed, rank, world_size)
        share = len(sampler)
    elif distributed:
        sampler = OrderedDistributedSampler(dataset, world_size, rank)
    if is_training and share < batch_size:
        raise ValueError(f"batch_size={batch_size} is more than the {share} recordings to train on")
    return EventLoader(
        dataset,
        seed=seed,
        rank=rank,
        batch_size=batch_size,
        sampler=sampler,
        num_workers=num_workers,
        pin_memory=pin_memory,
        drop_last=is_training,
    )
