"""A loader resumed at any batch gives the batches and leaves the random numbers of one that never stopped."""

import random

import numpy as np
import pytest
import torch
from timm.data import create_loader
from timm.data.loader import PrefetchLoader
from torch.utils.data import DataLoader, Dataset

from timm_qkformer.training.trainer.data import SwitchableCollateMixup
from timm_qkformer.training.trainer.replay import ReplayableLoader, random_state, restore_random_state

CPU = torch.device("cpu")


class Draws(Dataset):
    """Samples that come from every generator."""

    def __init__(self, size=14):
        self.size = size

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        draws = torch.tensor([index, torch.rand(()), np.random.rand(), random.random()])
        return draws.expand(3, 4, 4).clone(), index


def make(workers, prefetch, persistent=True):
    more = {"num_workers": workers, "persistent_workers": persistent and workers > 0}
    loader = DataLoader(Draws(), batch_size=2, shuffle=True, drop_last=True, **more)
    replayable = ReplayableLoader(loader, CPU)
    if not prefetch:
        return replayable, replayable
    prefetching = PrefetchLoader(loader, mean=(0.0,) * 3, std=(1 / 255,) * 3, device=CPU, re_prob=0.5, re_mode="pixel")
    prefetching.loader = replayable
    return prefetching, replayable


def seed():
    torch.manual_seed(1)
    np.random.seed(2)
    random.seed(3)


def steps(batches, replayable, epochs, start=(0, 0), save_at=()):
    """(batch, what a model would draw) of every step, and the positions at some places."""
    out, saved = [], {}
    for epoch in range(start[0], epochs):
        consumed = start[1] if epoch == start[0] else 0
        if (epoch, 0) in save_at:
            saved[epoch, 0] = replayable.position(0)
        for x, _ in batches:
            consumed += 1
            out.append(((epoch, consumed), x.clone(), torch.rand(2), np.random.rand(), random.random()))
            if (epoch, consumed) in save_at:
                saved[epoch, consumed] = replayable.position(consumed)
        torch.rand(1)  # something between epochs
    return out, saved


def equal(a, b):
    return a[0] == b[0] and torch.equal(a[1], b[1]) and torch.equal(a[2], b[2]) and a[3:] == b[3:]


# Seven batches of an epoch: with 3 workers the last round is not full.
@pytest.mark.parametrize("prefetch", [False, True])
@pytest.mark.parametrize(
    ("workers", "places", "persistent"),
    [
        (0, [(0, 1), (0, 6), (0, 7), (1, 0), (1, 4)], True),
        (1, [(0, 3), (1, 7)], True),
        (2, [(0, 3)], False),
        (3, [(0, 1), (0, 3), (1, 0), (1, 5), (1, 7)], True),
    ],
)
@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_resumed_at(workers, prefetch, places, persistent):
    seed()
    whole, positions = steps(*make(workers, prefetch, persistent), 3, save_at=places)
    for place in places:
        torch.manual_seed(99)  # a new process
        batches, replayable = make(workers, prefetch, persistent)
        replayable.resume(positions[place])
        rest, _ = steps(batches, replayable, place[0] + 2, start=place)
        expected = [step for step in whole if place < step[0] < (place[0] + 2, 0)]
        assert len(rest) == len(expected) > 0
        assert all(equal(a, b) for a, b in zip(rest, expected, strict=True)), place


def test_a_position_survives_a_checkpoint(tmp_path):
    seed()
    _, positions = steps(*make(2, True), 1, save_at=[(0, 3)])
    position = positions[0, 3]
    torch.save(position, tmp_path / "p.pt")
    loaded = torch.load(tmp_path / "p.pt", weights_only=True)
    assert loaded == position
    assert {type(value) for state in loaded["workers"] for value in state.values()} <= {bytes, int, float, type(None)}


@pytest.mark.parametrize("workers", [0, 2])
def test_uninterrupted_it_is_the_loader(workers):
    def draws(wrapped):
        seed()
        loader = DataLoader(Draws(), 2, shuffle=True, num_workers=workers, persistent_workers=workers > 0)
        batches = ReplayableLoader(loader, CPU) if wrapped else loader
        return [(x, torch.rand(1)) for _ in range(2) for x, _ in batches]

    for (x, u), (y, v) in zip(draws(True), draws(False), strict=True):
        assert torch.equal(x, y)
        assert torch.equal(u, v)


def test_random_state_is_complete():
    np.random.randn()  # leaves a second normal number behind
    random.gauss(0, 1)
    state = random_state()
    first = (torch.rand(3).tolist(), np.random.randn(), np.random.rand(), random.gauss(0, 1), random.random())
    seed()
    restore_random_state(state)
    assert first == (torch.rand(3).tolist(), np.random.randn(), np.random.rand(), random.gauss(0, 1), random.random())


class Flat(Dataset):
    """Black and white pictures as a prefetcher gets them."""

    transform = None

    def __len__(self):
        return 8

    def __getitem__(self, index):
        return np.full((3, 4, 4), 255 * (index % 2), dtype=np.uint8), index % 2


@pytest.mark.parametrize("workers", [0, 2])
def test_mixup_can_be_switched_off_in_workers_that_live_on(workers):
    collate = SwitchableCollateMixup(mixup_alpha=5.0, num_classes=2, label_smoothing=0.0)
    dataset = Flat()
    more = {"num_workers": workers, "collate_fn": collate, "device": CPU}
    loader = create_loader(dataset, (3, 4, 4), 8, is_training=True, use_prefetcher=True, **more)
    dataset.transform = None
    np.random.seed(0)
    mixed = []
    for enabled in (True, False, True):
        loader.mixup_enabled = enabled
        assert loader.mixup_enabled == enabled
        targets = torch.cat([target for _, target in loader])
        mixed.append(bool(((targets > 0) & (targets < 1)).any()))
    assert mixed[1] is False
    assert mixed[0] or mixed[2]
