"""Loaders that resume in the middle of an epoch as if they had never stopped.

A position is a dict of plain values for a checkpoint. It holds the random numbers as they were at four points:

- when the epoch began, from which the order of the samples is drawn again;
- in each worker, at the last batch before which all workers had done equally many (a "round");
- before the batch was loaded that a prefetcher holds back when the checkpoint is written, if one does: in this
  process random erasing, and without workers all augmentation, drew for that batch already;
- at the checkpoint itself.

So only the batches since the beginning of the round are loaded twice, fewer than there are workers.
"""

import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Sampler, get_worker_info

Position = dict[str, Any]
# Bytes, numbers and None only, which a pipe carries cheaply. A checkpoint has tensors in place of bytes.
RandomState = dict[str, Any]


def random_state(device: torch.device | None = None) -> RandomState:
    """State of the generators of torch, numpy and random in this process, and of a CUDA device if one is given."""
    _, keys, position, has_gauss, gauss = np.random.get_state()
    version, words, python_gauss = random.getstate()
    return {
        "torch": _bytes(torch.get_rng_state()),
        "numpy": np.asarray(keys).tobytes(),
        "numpy_position": int(position),
        "numpy_gauss": float(gauss) if has_gauss else None,
        "python": np.asarray(words, dtype=np.uint32).tobytes(),
        "python_version": version,
        "python_gauss": python_gauss,
        "cuda": _bytes(torch.cuda.get_rng_state(device)) if device is not None and device.type == "cuda" else None,
    }


def restore_random_state(state: RandomState, device: torch.device | None = None) -> None:
    """Continue all generators where `random_state` saw them."""
    torch.set_rng_state(_tensor(state["torch"]))
    gauss = state["numpy_gauss"]
    keys = np.frombuffer(_raw(state["numpy"]), dtype=np.uint32)
    np.random.set_state(("MT19937", keys, state["numpy_position"], int(gauss is not None), gauss or 0.0))
    words = tuple(np.frombuffer(_raw(state["python"]), dtype=np.uint32).tolist())
    random.setstate((state["python_version"], words, state["python_gauss"]))
    if state["cuda"] is not None and device is not None and device.type == "cuda":
        torch.cuda.set_rng_state(_tensor(state["cuda"]), device)


def _bytes(state: Tensor) -> bytes:
    return state.numpy().tobytes()


def _raw(state: bytes | Tensor) -> bytes:
    return _bytes(state) if isinstance(state, Tensor) else state


def _tensor(state: bytes | Tensor) -> Tensor:
    return torch.frombuffer(bytearray(_raw(state)), dtype=torch.uint8)


class _ReplayableSampler(Sampler[int]):
    """A sampler whose beginning can be skipped once."""

    def __init__(self, sampler: Sampler[int]) -> None:
        self.sampler = sampler
        self._replay: tuple[int, Callable[[], None]] | None = None

    def __len__(self) -> int:
        return len(self.sampler)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[int]:
        if self._replay is None:
            yield from self.sampler
            return
        (skip, then), self._replay = self._replay, None
        order = list(self.sampler)  # draws, as it did in the first run
        then()
        yield from order[skip:]

    def replay(self, skip: int, then: Callable[[], None]) -> None:
        """Skip so many samples of the next order, and call `then` once it is drawn."""
        self._replay = skip, then


class _Reporting:
    """A collate function that also returns the random state of its worker, after the batch."""

    def __init__(self, collate: Callable[[Any], Any]) -> None:
        self.collate = collate

    def __call__(self, samples: Any) -> tuple[Any, RandomState | None]:
        batch = self.collate(samples)
        return batch, None if get_worker_info() is None else random_state()


class _Restoring:
    """A worker's initial function that resumes from a saved random state, if there is one."""

    def __init__(self, initialize: Callable[[int], None] | None) -> None:
        self.initialize = initialize
        self.states: list[RandomState | None] = []

    def __call__(self, worker: int) -> None:
        if self.initialize is not None:
            self.initialize(worker)
        if worker < len(self.states) and (state := self.states[worker]) is not None:
            restore_random_state(state)


class ReplayableLoader:
    """A DataLoader over a map-style data set, with `position` and `resume`.

    Uninterrupted it draws the same random numbers at the same points as the DataLoader alone, and gives the same
    batches. May stand inside timm's PrefetchLoader, which pulls one batch ahead.

    Args:
        loader: Loader with automatic batching. It is changed: use it through this object only.
        device: Where the model trains; a CUDA device's random numbers are saved as well.
    """

    def __init__(self, loader: DataLoader, device: torch.device) -> None:
        self.loader = loader
        self.device = device
        loader.collate_fn = self._reporting = _Reporting(loader.collate_fn)
        loader.worker_init_fn = self._restoring = _Restoring(loader.worker_init_fn)
        self._order = _ReplayableSampler(loader.batch_sampler.sampler)  # type: ignore[union-attr]
        loader.batch_sampler.sampler = self._order  # type: ignore[union-attr]
        # What timm's PrefetchLoader and training loop look for.
        self.dataset, self.sampler, self.batch_sampler = loader.dataset, loader.sampler, loader.batch_sampler
        self._resume: Position | None = None
        self._workers: list[RandomState | None] = [None] * loader.num_workers
        self._began = False  # an epoch, ever
        self._begin_epoch()

    def __len__(self) -> int:
        return len(self.loader)

    @property
    def collate_fn(self) -> Any:
        """The inner loader's function that makes a batch of samples."""
        return self._reporting.collate

    def position(self, consumed: int) -> Position:
        """Where training is after so many batches of this epoch; 0 between epochs.

        Args:
            consumed: Batches that training has used, at most one fewer than were pulled from this loader.
        """
        if consumed == 0:
            self._begin_epoch()
        workers = self.loader.num_workers
        first = consumed // workers * workers if workers else consumed
        return {
            "consumed": consumed,
            "workers": self._round if self._pulled > first else list(self._workers),
            "workers_began": self._began if consumed == 0 else not self._fresh,
            "epoch": self._at_epoch,
            "pending": self._at_pull if self._pulled > consumed else None,
            "now": random_state(self.device),
        }

    def resume(self, position: Position) -> None:
        """Make the next epoch the interrupted one; another number of workers keeps the order, not the augmentation."""
        workers = self.loader.num_workers
        if workers == len(position["workers"]):
            self._workers = list(position["workers"])
        self._began = position["workers_began"]
        if self._began and workers and self.loader.persistent_workers:
            # The workers' seeds were drawn once, before: not from this run's numbers a second time.
            self.loader.generator = torch.Generator()
        if position["consumed"]:
            self._resume = position
        restore_random_state(position["now"], self.device)

    def _begin_epoch(self) -> None:
        self._pulled = 0
        self._round: list[RandomState | None] = list(self._workers)
        self._at_epoch: RandomState | None = None
        self._at_pull: RandomState | None = None

    def __iter__(self) -> Iterator[Any]:
        workers = self.loader.num_workers
        position, self._resume = self._resume, None
        if not self.loader.persistent_workers and position is None:
            self._workers = [None] * workers  # new ones, with new seeds
        self._begin_epoch()
        self._fresh = not self._began
        self._began = True
        consumed = first = 0
        if position is not None:
            consumed = position["consumed"]
            first = consumed // workers * workers if workers else consumed
            restore_random_state(position["epoch"], self.device)
            here = position["pending"] or position["now"]
            skip = first * self.loader.batch_size
            self._order.replay(skip, lambda: restore_random_state(here, self.device))
        self._at_epoch = random_state(self.device)
        self._restoring.states = list(self._workers)
        batches = iter(self.loader)
        self._restoring.states = []
        for index in range(first, len(self.loader)):
            if index >= consumed:
                self._at_pull = random_state(self.device)
            batch, state = next(batches)
            if workers:
                if index % workers == 0:
                    self._round = list(self._workers)
                self._workers[index % workers] = state
            self._pulled = index + 1
            if index < consumed:
                continue
            yield batch
            if position is not None and position["pending"] is not None and index == consumed:
                restore_random_state(position["now"], self.device)
        # Lets the DataLoader end its epoch; nothing is left in it.
        for _ in batches:
            raise RuntimeError("the loader gives more batches than its length")
