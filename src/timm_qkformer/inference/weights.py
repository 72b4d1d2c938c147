"""Convolutions with their batch norm folded in, and weights of 8 and 16 bits."""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torchvision.ops.misc import FrozenBatchNorm2d

from ..layers import ConvNorm

__all__ = ["MAX_WEIGHT", "Folded", "fold", "quantise", "to_bfloat16"]

# Symmetric: -128 is left out, so that a weight and its negative are equally exact.
MAX_WEIGHT = 127

# How far from a whole number of steps, of 127, a weight may be that rounding in float32 has moved.
_NOISE = 1e-3


class Folded(NamedTuple):
    """A convolution that includes its batch norm, in float64."""

    weight: Tensor  # [C', C / groups, k, k]
    bias: Tensor  # [C']


def fold(unit: ConvNorm, name: str) -> Folded:
    """Fold the batch norm, as it is in eval mode, into the convolution before it.

        y = gamma (W x + b - mean) / sqrt(var + eps) + beta  =  (g W) x + g (b - mean) + beta,  g = gamma / sqrt(...)

    Args:
        unit: The convolution and its batch norm.
        name: What to call it in errors.

    Raises:
        TypeError: For other layers in the two places.
        ValueError: For a batch norm that keeps no running statistics, or weights that are not finite.
    """
    conv, bn = unit.conv, unit.bn
    if type(conv) is not nn.Conv2d or not _is_square(conv):
        raise TypeError(f"{name}.conv is {conv}, expected an nn.Conv2d that pads a square kernel by half, with zeros")
    if not isinstance(bn, (nn.BatchNorm2d, nn.SyncBatchNorm, FrozenBatchNorm2d)):  # the last by timm.utils.freeze
        raise TypeError(f"{name}.bn is a {type(bn).__name__}, expected a batch norm in two dimensions")
    if bn.running_mean is None or bn.running_var is None:
        raise ValueError(f"{name}.bn keeps no running statistics (track_running_stats=False): nothing to fold")
    gain = torch.rsqrt(bn.running_var.detach().double() + bn.eps)
    if bn.weight is not None:
        gain = gain * bn.weight.detach().double()
    offset = -bn.running_mean.detach().double()
    if conv.bias is not None:
        offset = offset + conv.bias.detach().double()
    bias = gain * offset
    if bn.bias is not None:
        bias = bias + bn.bias.detach().double()
    weight = conv.weight.detach().double() * gain[:, None, None, None]
    if not (weight.isfinite().all() and bias.isfinite().all()):
        raise ValueError(f"{name}: convolution and batch norm together have weights that are not finite")
    return Folded(weight, bias)


def quantise(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Weights [C', ...] as int8 and one float32 scale per output channel: int8 * scale, to within scale / 2."""
    scale = weight.abs().flatten(1).amax(1).to(torch.float32) / MAX_WEIGHT
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))  # a channel of zeros
    steps = weight / scale.to(weight.dtype).view(-1, *[1] * (weight.dim() - 1))
    return steps.round().clamp(-MAX_WEIGHT, MAX_WEIGHT).to(torch.int8), scale


def to_bfloat16(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Weights [C', ...] as bfloat16 and one float32 scale per output channel: bfloat16 * scale.

    The scale is 1, except for channels whose weights are whole steps (see `round_weights`): those are kept exactly.
    """
    steps, scale = quantise(weight)
    shape = (-1, *[1] * (weight.dim() - 1))
    off = (weight / scale.to(weight.dtype).view(shape) - steps).abs().flatten(1).amax(1)
    scale = torch.where(off < _NOISE, scale, torch.ones_like(scale))
    return torch.where(scale.view(shape) == 1, weight, steps.to(weight.dtype)).to(torch.bfloat16), scale


def _is_square(conv: nn.Conv2d) -> bool:
    side, stride = conv.kernel_size[0], conv.stride[0]
    expected = ((side, side), (stride, stride), (side // 2, side // 2), (1, 1), "zeros")
    return (conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.padding_mode) == expected
