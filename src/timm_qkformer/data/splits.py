"""Splits of data sets that come without one."""

import math
from collections.abc import Sequence

import numpy as np

__all__ = ["split_by_class"]


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
