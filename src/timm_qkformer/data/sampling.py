"""The order of the training samples, in one process and in several."""

from collections.abc import Callable, Iterator

import torch
from torch.utils.data import Sampler

__all__ = ["SharedRandomSampler"]


class SharedRandomSampler(Sampler[int]):
    """A process's share of a random order that all processes have in common.

    The i-th batches of all processes together are the i-th batch of a single process with a batch that many times as
    large: sample n of the common order goes to process n modulo their number, and what does not come out even is left
    out. The order is that of torch's RandomSampler with the same seed.

    Args:
        size: Number of samples.
        draw_seed: Gives the seed of the next order, the same in all processes.
        rank: Number of this process.
        world_size: Number of processes.
    """

    def __init__(self, size: int, draw_seed: Callable[[], int], rank: int = 0, world_size: int = 1) -> None:
        self.size = size
        self.draw_seed = draw_seed
        self.rank = rank
        self.world_size = world_size

    def __len__(self) -> int:
        return self.size // self.world_size

    def __iter__(self) -> Iterator[int]:
        order = torch.randperm(self.size, generator=torch.Generator().manual_seed(self.draw_seed()))
        yield from order[self.rank :: self.world_size][: len(self)].tolist()
