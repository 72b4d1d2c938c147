"""Batches of event clips."""

from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, DistributedSampler, Sampler

__all__ = ["EventLoader", "create_event_loader"]


class EventLoader(DataLoader):
    """A DataLoader whose order and workers' seeds follow from (seed, epoch, rank) alone, see `create_event_loader`."""

    def __init__(self, dataset: Dataset, *, seed: int, rank: int = 0, **kwargs: Any) -> None:
        self.seed = seed
        self.rank = rank
        super().__init__(dataset, generator=torch.Generator(), **kwargs)
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Say which epoch comes next: the same epoch gives the same batches, in a resumed run too."""
        if isinstance(self.sampler, DistributedSampler):
            self.sampler.set_epoch(epoch)
        assert self.generator is not None
        # Large odd factors keep (seed, epoch, rank) and (seed + 1, epoch - 1, rank) and the like apart.
        self.generator.manual_seed((self.seed * 0x9E3779B1 + epoch * 0x85EBCA77 + self.rank * 0xC2B2AE3D) % 2**63)


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
        distributed: Each process of the torch.distributed group loads its part. In evaluation the parts may repeat a
            few samples to be of one length, as timm's do.
        pin_memory: Copy batches to page-locked memory, for a GPU.

    Raises:
        ValueError: If there is not one full batch to train on.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} needs to be at least 1")
    sampler: Sampler | None = None
    rank = 0
    if distributed:
        rank = torch.distributed.get_rank()
        sampler = DistributedSampler(dataset, shuffle=is_training, seed=seed)
    share = len(dataset) if sampler is None else len(sampler)  # type: ignore[arg-type]
    if is_training and share < batch_size:
        raise ValueError(f"batch_size={batch_size} is more than the {share} recordings to train on")
    return EventLoader(
        dataset,
        seed=seed,
        rank=rank,
        batch_size=batch_size,
        shuffle=is_training and sampler is None,
        sampler=sampler,
        num_workers=num_workers,
        pin_memory=pin_memory,
        drop_last=is_training,
    )
