"""Which samples are taken, for which split, and in what order, in one process and in several."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import numpy as np
import torch
from torch.utils.data import Sampler

Item = TypeVar("Item")


def draw(items: Sequence[Item], number: int | None) -> list[Item]:
    """So many items, the first ones of a random order that is always the same; all of them, in theirs, for None.

    The first ones of sorted files would all be of the first classes.
    """
    if number is None or number >= len(items):
        return list(items)
    order = torch.randperm(len(items), generator=torch.Generator().manual_seed(0))
    return [items[i] for i in order[:number].tolist()]


def split_by_class(
    targets: Sequence[int], train_ratio: float = 0.9, seed: int | None = None
) -> tuple[list[int], list[int]]:
    """Split indices class by class, as spikingjelly's and the release's `split_to_train_test_set` do.

    Each class gives its first ceil(train_ratio * n) samples to the training set and the rest to the test set, classes
    in ascending order. CIFAR10-DVS has no official split; the published results use train_ratio 0.9 and no shuffling.

    Args:
        targets: Class index of each sample.
        train_ratio: Share of each class that is trained on, between 0 and 1 exclusive.
        seed: None takes the samples in their order, as published; a number shuffles each class first.

    Returns:
        Indices of the training samples, indices of the test samples.
    """
    if not 0 < train_ratio < 1:
        raise ValueError(f"train_ratio={train_ratio} needs to lie between 0 and 1 exclusive")
    classes = np.asarray(targets)
    rng = None if seed is None else np.random.default_rng(seed)
    train: list[int] = []
    test: list[int] = []
    for index in np.unique(classes):
        members = np.flatnonzero(classes == index)
        if rng is not None:
            rng.shuffle(members)
        first = math.ceil(len(members) * train_ratio)
        train += members[:first].tolist()
        test += members[first:].tolist()
    return train, test


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
