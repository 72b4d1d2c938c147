"""Models whose own weights are those that 8-bit inference has."""

import torch
from torch import Tensor, nn

from ..layers import ConvNorm
from ..models._hst import HierarchicalSpikingTransformer
from .weights import MAX_WEIGHT

__all__ = ["round_weights"]

# Significant bits of a step. A weight of up to 127 steps then has no more than the 11 of float16, so that files in half
# precision hold it exactly.
_STEP_BITS = 4


@torch.no_grad()
def round_weights(model: nn.Module) -> None:
    """Round a model's weights, in place, to what `deploy(model, "int8")` keeps of them.

    In all convolutions but the first, the weights of every output channel become multiples, -127 to 127, of one step.
    Deployed in "int8" or "bf16" they are no longer rounded: the deployed model is then equal to this one, as in "fp32",
    but for the order of sums and, in "bf16" where products are dense, rounded currents. So measure the rounded model,
    and what is measured is what will run.

    Batch norms keep their statistics and weights. Training moves weights off their steps again. Rounding twice is
    rounding once.

    Args:
        model: A QKFormer or Max-Former.

    Raises:
        TypeError: For another kind of model.
        ValueError: For weights that are not finite, with their name; nothing is rounded then.
    """
    if not isinstance(model, HierarchicalSpikingTransformer):
        raise TypeError(f"model is a {type(model).__name__}, expected a QKFormer or MaxFormer, without a wrapper")
    units = {name: unit for name, unit in model.stages.named_modules() if isinstance(unit, ConvNorm)}
    for name, unit in units.items():
        if not unit.conv.weight.isfinite().all():
            raise ValueError(f"stages.{name}.conv.weight has values that are not finite: nothing was rounded")
    for unit in units.values():
        unit.conv.weight.copy_(_rounded(unit.conv.weight))


def _rounded(weight: Tensor) -> Tensor:
    rows = weight.double().flatten(1)
    largest, place = rows.abs().max(1, keepdim=True)
    mantissa, exponent = torch.frexp(largest / MAX_WEIGHT)
    step = torch.ldexp((mantissa * 2**_STEP_BITS).round() / 2**_STEP_BITS, exponent)
    step = torch.where(largest > 0, step, torch.ones_like(step))  # a channel of zeros
    steps = (rows / step).round().clamp(-MAX_WEIGHT, MAX_WEIGHT)
    # `quantise` takes the largest weight for 127 steps.
    steps.scatter_(1, place, MAX_WEIGHT * rows.gather(1, place).sign())
    return (steps * step).view_as(weight).to(weight.dtype)
