"""Weights of deployed models: batch norms folded in, 8 and 16 bits; what "fp32", "bf16" and "int8" mean on a device."""

import warnings
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torchvision.ops.misc import FrozenBatchNorm2d

from ..execution.packing import Range
from ..layers import ConvNorm
from ..models import SpikingTransformer

PRECISIONS = ("fp32", "bf16", "int8")
PRODUCTS = ("auto", "events", "dense")

# Symmetric: -128 is left out, so that a weight and its negative are equally exact.
_MAX_WEIGHT = 127

# How far from a whole number of steps, of 127, a weight may be that rounding in float32 has moved.
_NOISE = 1e-3

# Significant bits of a step. A weight of up to 127 steps then has no more than the 11 of float16, so that files in half
# precision hold it exactly.
_STEP_BITS = 4

# The largest sum of spikes in 8-bit arithmetic. Processors without int8 dot products add pairs of products up in 16
# bits, saturating: 2 * 129 * 127 is the most that fits.
_MAX_SUM = 129

_MAX_BFLOAT16 = 256  # whole numbers up to which bfloat16 holds all

_warned: set[str] = set()


def fits_bytes(numbers: Range) -> bool:
    """Whether 8-bit arithmetic is exact for what a network passes on."""
    return numbers.low >= 0 and numbers.high <= _MAX_SUM


def check_sums(numbers: Range, stage: str, precision: str, products: str) -> None:
    """Refuse arithmetic in which what a stage passes on would not be exact.

    Raises:
        ValueError: For sums of spikes beyond 8-bit arithmetic, or event-driven products of what is no sum of spikes.
    """
    if fits_bytes(numbers):
        return
    are_sums = numbers.low >= 0 and not numbers.is_real
    refused = [
        *(['precision="int8"'] if precision == "int8" and are_sums else []),
        *(['products="events"'] if products == "events" else []),
    ]
    if refused:
        asked = " and ".join(refused)
        found = f"sums of spikes in {stage} can reach {numbers.high:g}" if are_sums else f"{stage} passes on {numbers}"
        raise ValueError(
            f'{asked}: {found}, 8-bit arithmetic is exact up to {_MAX_SUM}, from 0: use precision="fp32" with '
            'products="auto"'
        )


def weights_dtype(precision: str, full: torch.dtype) -> torch.dtype:
    """What weights are stored in; `full`: float32, or float64 for a model in float64."""
    return {"fp32": full, "bf16": torch.bfloat16, "int8": torch.int8}[precision]


def spikes_dtype(precision: str, like: Tensor, events: bool, numbers: Range) -> torch.dtype:
    """What spikes are stored in, which decides the arithmetic of the convolutions that take them.

    For events, which CPUs add up, bytes. For dense products, what is multiplied: where the device has no arithmetic for
    the precision, or the precision would round what the network passes on (`numbers`), weights keep their values and
    products are taken in full precision, that of the tensor `like`; the first time, a warning says so. Bfloat16
    products have bfloat16 sums, too coarse for a model in float64: its products are taken in float64.
    """
    device = like.device
    if events and device.type == "cpu":
        return torch.uint8
    exact = {"fp32": True, "bf16": max(-numbers.low, numbers.high) <= _MAX_BFLOAT16, "int8": fits_bytes(numbers)}
    full = str(like.dtype).removeprefix("torch.")
    if not exact[precision]:
        _warn_once(
            f'precision="{precision}": the network passes on {numbers}, so its rounded weights are multiplied in '
            f"{full}: no less exact, no faster than fp32"
        )
    elif precision == "bf16" and like.dtype != torch.float64:
        if has_onednn(torch.bfloat16, device) or (device.type == "cuda" and torch.cuda.is_bf16_supported(False)):
            return torch.bfloat16
        _warn_once(
            f'precision="bf16": no bfloat16 arithmetic on this {device.type}, so weights rounded to bfloat16 are '
            f"multiplied in {full}: no less exact, no faster than fp32"
        )
    elif precision == "int8":
        if has_onednn(torch.uint8, device):
            return torch.uint8
        _warn_once(
            f'precision="int8": no 8-bit arithmetic on this {device.type}, so 8-bit weights are multiplied in {full}: '
            "the same values, no faster than fp32"
        )
    return like.dtype


def has_onednn(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether oneDNN multiplies matrices of this dtype here (uint8: with int8), and not just by emulation."""
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    if dtype == torch.uint8:
        return "onednn" in torch.backends.quantized.supported_engines
    return dtype == torch.float32


def _warn_once(message: str) -> None:
    if message not in _warned:
        _warned.add(message)
        warnings.warn(message, RuntimeWarning, stacklevel=2)


class Folded(NamedTuple):
    """A convolution that includes its batch norm, in float64."""

    weight: Tensor  # [C', C / groups, k, k]
    bias: Tensor  # [C']


def fold(unit: ConvNorm, name: str) -> Folded:
    """Fold the batch norm, as it is in eval mode, into the convolution before it; `nn.Identity` is none.

        y = gamma (W x + b - mean) / sqrt(var + eps) + beta  =  (g W) x + g (b - mean) + beta,  g = gamma / sqrt(...)

    Args:
        unit: The convolution and its batch norm.
        name: What to call it in errors.

    Raises:
        TypeError: For other layers in the two places.
        ValueError: For a batch norm that keeps no running statistics, or weights that are not finite.
    """
    conv = unit.conv
    bn: nn.Module = unit.bn
    if type(conv) is not nn.Conv2d or not _is_square(conv):
        raise TypeError(f"{name}.conv is {conv}, expected an nn.Conv2d that pads a square kernel by half, with zeros")
    if type(bn) is nn.Identity:
        bias = torch.zeros(conv.out_channels) if conv.bias is None else conv.bias.detach()
        return _checked(Folded(conv.weight.detach().double(), bias.to(conv.weight.device, torch.float64)), name)
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
    return _checked(Folded(conv.weight.detach().double() * gain[:, None, None, None], bias), name)


def _checked(folded: Folded, name: str) -> Folded:
    if not (folded.weight.isfinite().all() and folded.bias.isfinite().all()):
        raise ValueError(f"{name}: convolution and batch norm together have weights that are not finite")
    return folded


def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Weights [C', ...] as int8 and one float32 scale per output channel: int8 * scale, to within scale / 2."""
    scale = weight.abs().flatten(1).amax(1).to(torch.float32) / _MAX_WEIGHT
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))  # a channel of zeros
    steps = weight / scale.to(weight.dtype).view(-1, *[1] * (weight.dim() - 1))
    return steps.round().clamp(-_MAX_WEIGHT, _MAX_WEIGHT).to(torch.int8), scale


def to_bfloat16(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Weights [C', ...] as bfloat16 and one float32 scale per output channel: bfloat16 * scale.

    The scale is 1, except for channels whose weights are whole steps (see `quantize_weights`): those are kept exactly.
    """
    steps, scale = quantize(weight)
    shape = (-1, *[1] * (weight.dim() - 1))
    off = (weight / scale.to(weight.dtype).view(shape) - steps).abs().flatten(1).amax(1)
    scale = torch.where(off < _NOISE, scale, torch.ones_like(scale))
    return torch.where(scale.view(shape) == 1, weight, steps.to(weight.dtype)).to(torch.bfloat16), scale


def _is_square(conv: nn.Conv2d) -> bool:
    side, stride = conv.kernel_size[0], conv.stride[0]
    expected = ((side, side), (stride, stride), (side // 2, side // 2), (1, 1), "zeros")
    return (conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.padding_mode) == expected


@torch.no_grad()
def quantize_weights(model: nn.Module) -> None:
    """Fake quantization: round a model's weights, in place, to what `deploy(model, "int8")` keeps of them.

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
    if not isinstance(model, SpikingTransformer):
        raise TypeError(f"model is a {type(model).__name__}, expected a QKFormer or MaxFormer, without a wrapper")
    units = {name: unit for name, unit in model.stages.named_modules() if isinstance(unit, ConvNorm)}
    for name, unit in units.items():
        if not unit.conv.weight.isfinite().all():
            raise ValueError(f"stages.{name}.conv.weight has values that are not finite: nothing was rounded")
    for unit in units.values():
        unit.conv.weight.copy_(_rounded(unit.conv.weight))


def _rounded(weight: Tensor) -> Tensor:
    rows = weight.double().flatten(1)
    largest, index = rows.abs().max(1, keepdim=True)
    mantissa, exponent = torch.frexp(largest / _MAX_WEIGHT)
    step = torch.ldexp((mantissa * 2**_STEP_BITS).round() / 2**_STEP_BITS, exponent)
    step = torch.where(largest > 0, step, torch.ones_like(step))  # a channel of zeros
    steps = (rows / step).round().clamp(-_MAX_WEIGHT, _MAX_WEIGHT)
    # `quantize` takes the largest weight for 127 steps.
    steps.scatter_(1, index, _MAX_WEIGHT * rows.gather(1, index).sign())
    return (steps * step).view_as(weight).to(weight.dtype)
