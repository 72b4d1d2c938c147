"""Memory of attention against the number of tokens: the paper's Fig. 4 and the table of its values.

As in the paper, Q, K (and V) are there already, [T, B, C, N] spikes in float32 with T = B = 1 and one head, and what
counts is the peak of what the attention allocates beyond them: result X', attention vector or matrix, and whatever
its neuron needs. The paper's figures fit 4 N C bytes for QKTA and 4 N^2 + 4 N C for SSA in the order (Q K^T) V, that is
X' and the matrix Q K^T. The release and this package run SSA as Q (K^T V), without that matrix.

Bytes are counted by a `TorchDispatchMode`, which sees every operation that reaches a kernel: it keeps the storages that
come out, asks before the next one which of them are gone, and keeps the largest sum. That is what the algorithm needs,
whatever the allocator's rounding and caching: the same on every machine. What it does not see is memory that a kernel
takes and gives back within one operation, such as a matrix library's buffers.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..execution import execution_policy
from .complexity import QUADRATIC, attention_core
from .hooks import inference

# Sides of the token map, and megabytes (2^20 bytes) on a GPU, float32, C = 256, T = B = 1, as published (arXiv
# 2403.16552, values of the figure on memory consumption).
PAPER_SIDES = tuple(range(10, 201, 10))
# fmt: off
PAPER_MEMORY: dict[str, dict[int, float]] = {
    "QKTA": dict(zip(PAPER_SIDES, (
        0.10, 0.40, 0.89, 1.58, 2.47, 3.56, 4.84, 6.32, 8.18, 10.35, 12.14, 14.23, 16.70, 20.22, 22.26, 26.29, 28.55,
        32.37, 36.41, 40.46,
    ), strict=True)),
    QUADRATIC: dict(zip(PAPER_SIDES, (
        0.14, 1.00, 3.97, 12.19, 26.44, 53.52, 97.64, 162.50, 258.19, 391.77, 570.69, 806.06, 1107.50, 1485.14,
        1954.03, 2525.00, 3214.30, 4036.88, 5007.25, 6143.06,
    ), strict=True)),
}
# fmt: on


class LiveTensors(TorchDispatchMode):
    """Context manager that measures the peak of what tensors made inside it take.

    Neurons have to run in eager mode inside (`execution_policy(neurons="eager")`): compiled code is one operation.

    Args:
        existing: Tensors that were there before and do not count, should an operation return them.
    """

    def __init__(self, existing: Sequence[Tensor] = ()) -> None:
        super().__init__()
        self.peak = 0  # most bytes alive at once so far
        self._existing = {StorageWeakRef(tensor.untyped_storage()).cdata for tensor in existing}
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self._alive = {key: entry for key, entry in self._alive.items() if not entry[0].expired()}
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                storage = leaf.untyped_storage()
                reference = StorageWeakRef(storage)
                if reference.cdata not in self._existing:
                    self._alive[reference.cdata] = (reference, storage.nbytes())
        self.peak = max(self.peak, sum(size for _, size in self._alive.values()))
        return out


@dataclass(frozen=True)
class AttentionMemory:
    """Memory and time of one kind of attention for one number of tokens."""

    kind: str  # see `attention_kinds`
    side: int  # side sqrt(N) of the map of tokens
    peak_bytes: int  # most bytes of tensors alive at once, beyond Q, K and V
    seconds: float | None  # median time of a run; None if no time was taken
    paper_mib: float | None  # the paper's megabytes (2^20 bytes) for this side, where it has them


def attention_memory(
    kinds: Sequence[str] = ("QKTA", "SSA", QUADRATIC),
    sides: Sequence[int] = PAPER_SIDES,
    dim: int = 256,
    rounds: int = 0,
    rate: float = 0.2,
    device: str = "cpu",
) -> list[AttentionMemory]:
    """Measure peak memory, and time, of attention on random spikes.

    Args:
        kinds: Of `attention_kinds`.
        sides: Sides sqrt(N) of the maps of tokens.
        dim: Channels C.
        rounds: How often every kind is timed, in turns; 0 for memory alone.
        rate: Firing rate of the spikes, which neither memory nor time should depend on.
        device: Where to run.

    Returns:
        One entry for each side and kind, in this order.

    Raises:
        ValueError: For an argument outside its range.
    """
    if rounds < 0 or dim < 1 or not 0.0 <= rate <= 1.0 or any(side < 1 for side in sides):
        raise ValueError(
            f"sides={tuple(sides)!r} and dim={dim} must be at least 1, rounds={rounds} at least 0, "
            f"rate={rate} between 0 and 1"
        )
    cores = {kind: attention_core(kind, dim, device=device) for kind in kinds}
    results = []
    for side in sides:
        generator = torch.Generator().manual_seed(side)
        calls = {}
        for kind, (attend, widths) in cores.items():
            shapes = [(1, 1, 1, width, side * side) for width in widths]
            spikes = [(torch.rand(shape, generator=generator) < rate).float().to(device) for shape in shapes]
            calls[kind] = (attend, spikes)
        seconds: dict[str, list[float]] = {kind: [] for kind in calls}
        peaks = {kind: _peak_bytes(*call) for kind, call in calls.items()}  # this warms up, too
        for _ in range(rounds):
            for kind, call in calls.items():
                seconds[kind].append(_seconds(*call, device))
        for kind, peak in peaks.items():
            median = statistics.median(seconds[kind]) if rounds else None
            published = PAPER_MEMORY.get(kind, {}).get(side) if dim == 256 else None
            results.append(AttentionMemory(kind, side, peak, median, published))
    return results


def peak_memory(model: nn.Module, x: Tensor) -> int:
    """Bytes that a forward pass of a batch needs at its peak: parameters, buffers, input and activations.

    In eval mode and without gradients; neurons in eager mode. See `LiveTensors` for what is counted.
    """
    fixed = [*model.parameters(), *model.buffers(), x]
    with inference(model):
        return sum(tensor.nbytes for tensor in fixed) + _peak_bytes(model, [x], fixed)


@torch.no_grad()
def _peak_bytes(run: Callable[..., Tensor], inputs: Sequence[Tensor], existing: Sequence[Tensor] = ()) -> int:
    with execution_policy(neurons="eager"), LiveTensors([*inputs, *existing]) as live:
        run(*inputs)
    return live.peak


@torch.no_grad()
def _seconds(run: Callable[..., Tensor], inputs: Sequence[Tensor], device: str) -> float:
    start = time.perf_counter()
    run(*inputs)
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
    return time.perf_counter() - start
