"""Memory of attention against the number of tokens: the paper's Fig. 4 and the table of its values.

As in the paper, Q, K (and V) are there already, [T, B, C, N] spikes in float32 with T = B = 1 and one head, and what
counts is the peak of what the attention allocates beyond them: result X', attention vector or matrix, and whatever
its neuron needs. The paper's figures fit 4 N C bytes for QKTA and 4 N^2 + 4 N C for SSA in the order (Q K^T) V, that is
X' and the matrix Q K^T. The release and this package run SSA as Q (K^T V), without that matrix.
"""

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Optional

import torch
from torch import Tensor, nn

from ..layers import set_lif_backend
from .attention_core import AttentionCore
from .live_tensors import LiveTensors
from .running import inference

__all__ = ["PAPER_MEMORY", "PAPER_SIDES", "AttentionMemory", "attention_memory", "peak_memory"]

# Side of the token map: megabytes (2^20 bytes) of QKTA and SSA on a GPU, float32, C = 256, T = B = 1, as published
# (arXiv 2403.16552, values of the figure on memory consumption).
PAPER_MEMORY: dict[int, tuple[float, float]] = {
    10: (0.10, 0.14),
    20: (0.40, 1.00),
    30: (0.89, 3.97),
    40: (1.58, 12.19),
    50: (2.47, 26.44),
    60: (3.56, 53.52),
    70: (4.84, 97.64),
    80: (6.32, 162.50),
    90: (8.18, 258.19),
    100: (10.35, 391.77),
    110: (12.14, 570.69),
    120: (14.23, 806.06),
    130: (16.70, 1107.50),
    140: (20.22, 1485.14),
    150: (22.26, 1954.03),
    160: (26.29, 2525.00),
    170: (28.55, 3214.30),
    180: (32.37, 4036.88),
    190: (36.41, 5007.25),
    200: (40.46, 6143.06),
}
PAPER_SIDES = tuple(PAPER_MEMORY)


@dataclass(frozen=True)
class AttentionMemory:
    """Memory and time of one kind of attention for one number of tokens.

    Attributes:
        kind: "QKTA", "QKCA", "SSA" or "SSA as (Q K^T) V", see `ATTENTION_CORES`.
        side: Side sqrt(N) of the map of tokens.
        peak_bytes: Most bytes of tensors alive at once, beyond Q, K and V.
        seconds: Median time of a run; None if no time was taken.
        paper_mib: The paper's megabytes (2^20 bytes) for this side, where it has them.
    """

    kind: str
    side: int
    peak_bytes: int
    seconds: Optional[float]
    paper_mib: Optional[float]


def attention_memory(
    kinds: Sequence[str] = ("QKTA", "SSA", "SSA as (Q K^T) V"),
    sides: Sequence[int] = PAPER_SIDES,
    dim: int = 256,
    rounds: int = 0,
    rate: float = 0.2,
    device: str = "cpu",
) -> list[AttentionMemory]:
    """Measure peak memory, and time, of attention on random spikes.

    Args:
        kinds: Names in `ATTENTION_CORES`.
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
    cores = {kind: AttentionCore(kind, dim) for kind in kinds}
    results = []
    for side in sides:
        generator = torch.Generator().manual_seed(side)
        spikes = [(torch.rand(1, 1, dim, side, side, generator=generator) < rate).float().to(device) for _ in range(3)]
        inputs = {kind: spikes[: len(core.inputs)] for kind, core in cores.items()}
        seconds: dict[str, list[float]] = {kind: [] for kind in cores}
        peaks = {kind: _peak_bytes(core, inputs[kind]) for kind, core in cores.items()}  # which warms up, too
        for _ in range(rounds):
            for kind, core in cores.items():
                seconds[kind].append(_seconds(core, inputs[kind], device))
        for kind, peak in peaks.items():
            median = statistics.median(seconds[kind]) if rounds else None
            results.append(AttentionMemory(kind, side, peak, median, _published(kind, side, dim)))
    return results


def peak_memory(model: nn.Module, x: Tensor) -> int:
    """Bytes that a forward pass of a batch needs at its peak: parameters, buffers, input and activations.

    In eval mode and without gradients; neurons in eager mode. See `LiveTensors` for what is counted.
    """
    fixed = [*model.parameters(), *model.buffers(), x]
    with inference(model):
        return sum(tensor.nbytes for tensor in fixed) + _peak_bytes(model, [x])


def _published(kind: str, side: int, dim: int) -> Optional[float]:
    if dim != 256 or side not in PAPER_MEMORY or kind not in ("QKTA", "SSA as (Q K^T) V"):
        return None
    return PAPER_MEMORY[side][kind != "QKTA"]


@torch.no_grad()
def _peak_bytes(module: nn.Module, inputs: Sequence[Tensor]) -> int:
    existing = [*module.parameters(), *module.buffers(), *inputs]
    with set_lif_backend("eager"), LiveTensors(existing) as live:
        module(*inputs)
    return live.peak


@torch.no_grad()
def _seconds(module: nn.Module, inputs: Sequence[Tensor], device: str) -> float:
    start = time.perf_counter()
    module(*inputs)
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
    return time.perf_counter() - start
