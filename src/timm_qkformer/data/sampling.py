"""Which samples are taken and in what order, in one process and in several."""

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch
from torch.utils.data import Sampler

__all__ = ["SharedRandomSampler", "draw"]

Item = TypeVar("Item")


def draw(items: Sequence[Item], number: int | None) -> list[Item]:
    """So many items, the first ones of a random order that is always the same; all of them, in theirs, for None.

    The first ones of sorted files would all be of the first classes.
    """
    if number is None or number >= len(items):
        return list(items)
    order = torch.randperm(len(items), generator=torch.Generator().manual_seed(0))
    return [items[i] for i in order[:number].tolist()]


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
