"""What is faster on this machine: adding spikes up, event by event, or multiplying matrices. Measured once, then known.

Adding up takes a time that grows with the density of the input (its mean number of spikes an element), multiplying does
not. The two lines cross at a break-even density, which depends on the processor, the number of threads, the precision,
the kernel's side, and how many additions share the overhead of an event (`BreakEven`). It is measured in about a second
for each kind of product, when something big enough to gain by it is about to run, and kept on disk, so that later
processes choose as the first one did. The choice is made by the density that a layer has, never by the sample at hand.

The environment variable TIMM_QKFORMER_CALIBRATION names another file than the one in the cache of kernels, or says
"off": nothing is measured, and typical numbers stand in.
"""

import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from threading import RLock
from typing import Any, NamedTuple

import torch

from ..files import write_atomically
from . import compiler

ENVIRONMENT_VARIABLE = "TIMM_QKFORMER_CALIBRATION"

DENSITIES = (0.1, 0.4)  # at which adding up is timed
_ROUNDS = 4  # the first warms up, of the others the fastest counts
_VERSION = "calibration 2"  # of the kernels that are timed
_HIGHEST = 4.0  # density; beyond it nothing is told apart
_NO_NUMBER = float("inf")


class BreakEven(NamedTuple):
    """Density below which adding up is faster: `most`, less an overhead that many additions share."""

    most: float
    overhead: float = 0.0

    def holds(self, density: float, additions: int) -> bool:
        """Whether events are faster at this density.

        Args:
            density: Mean number of spikes an element of the input.
            additions: That make an output (products) or that a spike takes part in (gradients).
        """
        return density < self.most - self.overhead / additions


class Timed(NamedTuple):
    """One product to be timed."""

    additions: int  # see `BreakEven.holds`
    events: Sequence[Callable[[], Any]]  # at each of `DENSITIES`
    dense: Callable[[], Any]


_known: dict[str, BreakEven] = {}
_lock = RLock()


def break_even(kind: str, typical: BreakEven, timed: Callable[[], Sequence[Timed]]) -> BreakEven:
    """Where events and dense products break even on this machine; measured if nobody did before.

    Args:
        kind: Name of the product, such as "int8, 3x3".
        typical: What holds where nothing may be measured.
        timed: Makes the products to be timed, of two sizes or more.
    """
    if os.environ.get(ENVIRONMENT_VARIABLE) == "off":
        return _known.get(_key(kind), typical)  # what a saved run brought along counts
    key = _key(kind)
    with _lock:
        if key not in _known:
            path = file()
            with compiler.turn(path.with_suffix(".lock"), "the calibration"):
                _known.update({name: value for name, value in _read(path).items() if name not in _known})
                if key not in _known:
                    # Whatever the caller is in the middle of.
                    with torch.inference_mode(False), torch.no_grad(), torch.autocast("cpu", enabled=False):
                        _known[key] = fit(timed())
                    _write(path)
        return _known[key]


def known() -> dict[str, BreakEven]:
    """What was measured, by kind and circumstances: on disk and in this process."""
    with _lock:
        return {**({} if os.environ.get(ENVIRONMENT_VARIABLE) == "off" else _read(file())), **_known}


def state_dict() -> dict[str, dict[str, float]]:
    """What this process chose by, as numbers and text."""
    with _lock:
        return {name: value._asdict() for name, value in _known.items()}


def load_state_dict(state: Mapping[str, Mapping[str, Any]]) -> None:
    """Choose as the process that `state_dict` was called in, even on another machine."""
    with _lock:
        _known.update(_checked(state))


def fit(products: Sequence[Timed]) -> BreakEven:
    """Time products and fit the break-even density to them, by least squares."""
    points = [(1.0 / product.additions, _crossing(product)) for product in products]
    mean_x = sum(x for x, _ in points) / len(points)
    mean_y = sum(y for _, y in points) / len(points)
    spread = sum((x - mean_x) ** 2 for x, _ in points)
    slope = sum((x - mean_x) * (y - mean_y) for x, y in points) / spread if spread else 0.0
    overhead = max(0.0, -slope)  # small products are never the better for it: that is noise
    return BreakEven(round(mean_y + overhead * mean_x, 4), round(overhead, 2))


def _crossing(product: Timed) -> float:
    """Density at which adding up takes as long as multiplying."""
    runs = [*product.events, product.dense]
    best = [float("inf")] * len(runs)
    for turn in range(_ROUNDS):
        for i, run in enumerate(runs):
            start = time.perf_counter()
            run()
            if turn > 0:
                best[i] = min(best[i], time.perf_counter() - start)
    low, high, dense = best
    slope = (high - low) / (DENSITIES[1] - DENSITIES[0])
    if slope <= 0.0:
        return _HIGHEST if high <= dense else 0.0
    return min(_HIGHEST, max(0.0, DENSITIES[0] + (dense - low) / slope))


def file() -> Path:
    """Where calibrations are kept: of this machine's cache, or what the environment names."""
    named = os.environ.get(ENVIRONMENT_VARIABLE)
    return Path(named) if named else compiler.cache_folder() / f"calibration-{compiler.machine_key(_VERSION)}.json"


def _key(kind: str) -> str:
    return f"{kind}, {torch.get_num_threads()} threads"


def _read(path: Path) -> dict[str, BreakEven]:
    """What is on disk; damaged files and entries are as if not there."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return _checked(content) if isinstance(content, dict) else {}


def _checked(state: Mapping[str, Any]) -> dict[str, BreakEven]:
    found = {}
    for name, value in state.items():
        numbers = [value.get(field) for field in BreakEven._fields] if isinstance(value, Mapping) else []
        finite = [float(number) for number in numbers if isinstance(number, int | float) and 0.0 <= number < _NO_NUMBER]
        if len(finite) == len(BreakEven._fields):
            found[str(name)] = BreakEven(*finite)
    return found


def _write(path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps({**_read(path), **state_dict()}, indent=1) + "\n")
    except OSError:
        pass  # for this process alone, then
