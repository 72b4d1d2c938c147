"""Whether a convolution adds spikes up event by event while a model trains, rather than multiply matrices.

On CPUs, in float32 and bfloat16, where the input is known to be spikes or spike sums (`counts`) and few of them are not
zero: the products and the weights' gradients then cost a fraction (`events`). The inputs' gradients are dense as ever.
Results agree to rounding, as those of any two orders of summation; sums of bfloat16 weights and gradients are float32.

When does compiling the kernels pay? As with neurons (`fused`): the backend "compile" compiles at once, "auto" keeps
count of the multiplications that dense products have done in their stead and compiles once they exceed `AUTO_BUDGET`,
"eager" never does.
"""

from collections.abc import Sequence
from threading import Lock
from typing import NamedTuple

import torch
from torch import Tensor

from . import events
from .backend import current_lif_backend
from .native import may_run

__all__ = ["AUTO_BUDGET", "Choice", "choose", "event_products", "event_weight_gradient", "resume_work", "work_done"]

# Multiply-adds of products alone, without gradients: one core takes about as long for them as for compiling.
AUTO_BUDGET = 2**37


class _BreakEven(NamedTuple):
    """Mean spikes an element up to which events are faster: `most`, less an overhead that many additions share."""

    most: float
    overhead: float

    def holds(self, density: float, additions: int) -> bool:
        return density < self.most - self.overhead / additions


# For products by the additions that make an output, for gradients by those that a spike takes part in. Measured with
# AVX-512, where float32, dense and by events, is as fast as with AVX2; dense bfloat16 is twice as fast.
_PRODUCTS = {torch.float32: _BreakEven(0.6, 65), torch.bfloat16: _BreakEven(0.3, 100)}
_GRADIENTS = {torch.float32: _BreakEven(0.48, 90), torch.bfloat16: _BreakEven(0.22, 45)}

_counting = Lock()
_work = 0


def work_done() -> int:
    """Multiply-adds that have been done, so far, in the stead of events under "auto"."""
    return _work


def resume_work(done: int) -> None:
    """Count on from what `work_done` gave in another process, for "auto" to compile where that one would have."""
    global _work
    with _counting:
        _work = done


def _add_work(amount: int) -> None:
    global _work
    with _counting:
        _work += amount


class Choice(NamedTuple):
    """What of a convolution is computed event by event."""

    products: bool = False
    weight_gradient: bool = False


def choose(x: Tensor, weight: Tensor, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]) -> Choice:
    """What to compute event by event of a convolution of spikes or spike sums.

    Args:
        x: Integers from 0 to 255, [M, C, H, W].
        weight: Of a convolution without groups, [C', C, k, k], in the precision in which it is computed.
        stride, padding, dilation: Of the convolution.
    """
    outputs, channels, side, width = weight.shape
    fits = (
        weight.dtype in _PRODUCTS
        and channels <= events.MOST_CHANNELS
        and outputs % events.LEAST_OUTPUTS == 0
        and side == width
        and side % 2 == 1
        and list(padding) == [side // 2] * 2
        and list(dilation) == [1, 1]
        and stride[0] == stride[1]
    )
    if not fits or not may_run(x):
        return Choice()
    # A sum of spikes above one is one event, and counts as several here: cheaper than looking for them.
    density = x.sum(dtype=torch.float32).item() / x.numel()
    choice = Choice(
        _PRODUCTS[weight.dtype].holds(density, channels * side**2),
        stride[0] == 1 and _GRADIENTS[weight.dtype].holds(density, outputs * side**2),
    )
    if not any(choice):
        return choice
    if current_lif_backend() == "auto" and _work < AUTO_BUDGET:
        _add_work(x.numel() // stride[0] ** 2 * weight[:, 0].numel())
        return Choice()
    return choice if events.can_train(x) else Choice()


def event_products(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int) -> Tensor:
    """The convolution of spikes x [M, C, H, W] event by event, in the weights' dtype and channels-last memory."""
    bias = weight.new_zeros(len(weight)) if bias is None else bias
    weights = events.EventWeights(weight, bias, None, stride)
    return weights.currents(x.permute(0, 2, 3, 1).to(torch.uint8), dtype=weight.dtype).permute(0, 3, 1, 2)


def event_weight_gradient(x: Tensor, grad: Tensor, weight: Tensor) -> Tensor:
    """The weights' gradient of such a convolution of stride 1, in their dtype.

    Args:
        x: Spikes [M, C, H, W] as bytes in channels-last memory.
        grad: The result's gradient in float32 or bfloat16.
        weight: The weights.
    """
    rows = grad.contiguous(memory_format=torch.channels_last).permute(0, 2, 3, 1)
    gradient = torch.empty_like(weight)  # in memory as the weight is, which DistributedDataParallel wants
    events.weight_gradient(x.permute(0, 2, 3, 1), rows, gradient)
    return gradient
