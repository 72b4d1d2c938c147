"""Convolution and pooling that keep little for the backward pass, with the values and gradients of the plain modules.

    convolution   keeps its input packed (`packing`) where that holds few whole numbers
    max pooling   keeps which of its window's nine elements was the largest, four bits for each output

On CPUs, in float32 and bfloat16, convolutions of few spikes add weights up event by event (`events`) rather than
multiply matrices, in the forward pass and for the weights' gradients; the inputs' gradients are dense. Results agree to
rounding, as those of any two orders of summation; sums of bfloat16 weights and gradients are float32.

There are no second derivatives.
"""

from functools import lru_cache, partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from timm.layers import register_notrace_function
from torch import Tensor, nn

from . import events
from .calibration import DENSITIES, BreakEven, Timed, break_even
from .native import count_training_work, may_run, training_kernels_pay
from .packing import PackedTensor, SharedInput, counts, pack, refuse_second_derivatives, unpack
from .policy import current_policy

DEVICES = ("cpu", "cuda", "xpu")  # that torch has batch_norm_update_stats for

_HALF = (torch.bfloat16, torch.float16)


class _Conv(NamedTuple):
    stride: list[int]
    padding: list[int]
    dilation: list[int]
    groups: int


class _Choice(NamedTuple):
    """What of a convolution is computed event by event."""

    products: bool = False
    weight_gradient: bool = False


def convolve(conv: nn.Conv2d, shared: SharedInput) -> Tensor:
    """`conv`, which pads by numbers of zeros, on [T, B, C, H, W], to [T * B, C', H', W'] in channels-last memory."""
    assert not isinstance(conv.padding, str)
    options = _Conv(list(conv.stride), list(conv.padding), list(conv.dilation), conv.groups)
    result: Tensor = _Convolve.apply(shared.images, shared.packed, conv.weight, conv.bias, options)
    return result


class _Convolve(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, packed: PackedTensor | None, weight: Tensor, bias: Tensor | None, conv: _Conv
    ) -> Tensor:
        dtype = _autocast_dtype(x)
        ctx.conv, ctx.shape = conv, x.shape
        ctx.packed = None if packed is None else packed.without_data()  # which autograd keeps
        ctx.dtypes = x.dtype, dtype, None if bias is None else bias.dtype
        ctx.subsampled = _subsamples(weight, conv, x)
        x = _subsample(x, conv) if ctx.subsampled else x
        x = x.to(dtype)
        needs_x = ctx.needs_input_grad[2]
        ctx.save_for_backward(weight, *([x if packed is None else packed.data] if needs_x else []))
        compute = _compute_dtype(x, dtype)
        w = weight.to(dtype).to(compute)
        b = None if bias is None else bias.to(dtype).to(compute)
        ctx.stride = [1, 1] if ctx.subsampled else conv.stride
        ctx.events = _choose(x, packed, w, ctx.stride, conv)
        if ctx.events.products:
            return _event_products(x, w, b, ctx.stride[0]).to(dtype)
        with torch.autocast(x.device.type, enabled=False):
            y = F.conv2d(x.to(compute), w, b, ctx.stride, conv.padding, conv.dilation, conv.groups)
        return y.to(dtype)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivatives()
        weight, *saved = ctx.saved_tensors
        x_dtype, dtype, bias_dtype = ctx.dtypes
        compute = _compute_dtype(weight, dtype)
        conv = ctx.conv
        needs_x, _, needs_w, needs_b = ctx.needs_input_grad[:4]
        packed = None if ctx.packed is None or not saved else ctx.packed._replace(data=saved[0])
        grad = grad_outputs[0].to(compute)
        w = weight.to(dtype).to(compute)
        grad_w = None
        if ctx.events.weight_gradient and needs_w:
            assert packed is not None
            spikes = unpack(packed, torch.uint8)
            grad_w = _event_weight_gradient(_subsample(spikes, conv) if ctx.subsampled else spikes, grad, w)
            needs_w = False
        if not needs_w:  # of the input, the shape and the memory format alone are asked for
            x = torch.empty(ctx.shape, dtype=compute, device=weight.device, memory_format=torch.channels_last)
            x = _subsample(x, conv) if ctx.subsampled else x
        elif packed is None:
            x = saved[0].to(compute)
        else:
            x = unpack(packed, compute)
            x = _subsample(x, conv) if ctx.subsampled else x
        grads = torch.ops.aten.convolution_backward(
            grad,
            x,
            w,
            None if bias_dtype is None else [len(w)],
            ctx.stride,
            conv.padding,
            conv.dilation,
            False,
            [0, 0],
            conv.groups,
            [needs_x, needs_w, needs_b],
        )
        if grad_w is not None:
            grads = (grads[0], grad_w, grads[2])
        if ctx.subsampled and needs_x:
            whole = torch.empty(ctx.shape, dtype=compute, device=x.device, memory_format=torch.channels_last).zero_()
            whole[..., :: conv.stride[0], :: conv.stride[1]] = grads[0]
            grads = (whole, *grads[1:])
        grad_x, grad_w, grad_b = (
            None if grad is None else grad.to(dtype).to(wanted)
            for grad, wanted in zip(grads, (x_dtype, weight.dtype, bias_dtype), strict=True)
        )
        return grad_x, None, grad_w, grad_b, None


def _subsamples(weight: Tensor, conv: _Conv, x: Tensor) -> bool:
    """Whether the convolution is to see every n-th pixel, with stride 1, instead of all of them with stride n.

    The same numbers. On CPUs, oneDNN's gradients of strided 1x1 convolutions in channels-last memory write beyond
    their end with fewer channels than fit into a vector register (seen with torch 2.14 and AVX2: fewer than 8).
    """
    strided = weight.shape[2:] == (1, 1) and conv.stride != [1, 1] and conv.padding == [0, 0]
    return strided and x.device.type == "cpu"


def _subsample(x: Tensor, conv: _Conv) -> Tensor:
    return x[..., :: conv.stride[0], :: conv.stride[1]].contiguous(memory_format=torch.channels_last)


def _compute_dtype(x: Tensor, dtype: torch.dtype) -> torch.dtype:
    """Precision in which products of `dtype` are summed up fastest without being less exact."""
    if x.device.type == "cpu" and dtype in _HALF and not cpu_multiplies(dtype):
        return torch.float32
    return dtype


@lru_cache
def cpu_multiplies(dtype: torch.dtype) -> bool:
    """Whether this CPU has instructions for products of bfloat16 or float16."""
    # Without instructions for it torch falls back to loops that take ten times as long as float32.
    query = "_is_mkldnn_bf16_supported" if dtype == torch.bfloat16 else "_is_mkldnn_fp16_supported"
    supported = getattr(torch.ops.mkldnn, query, None)
    return supported is None or bool(supported())


def _autocast_dtype(x: Tensor) -> torch.dtype:
    """Precision of a matrix product's operands: autocast's, if it is on."""
    device_type = x.device.type
    if x.dtype != torch.float64 and device_type in DEVICES and torch.is_autocast_enabled(device_type):
        return torch.get_autocast_dtype(device_type)
    return x.dtype


@register_notrace_function
def matmul(a: Tensor, b: Tensor) -> Tensor:
    """a @ b. Under autocast, on CPUs without instructions for half precision, summed up in float32 and then rounded:
    no less exact, and many times as fast."""
    if not torch.jit.is_scripting():  # noqa: SIM102, TorchScript leaves out a branch, not half of a condition
        if isinstance(a, Tensor):  # a node of an FX graph has no dtype to ask for
            dtype = _autocast_dtype(a)
            compute = _compute_dtype(a, dtype)
            if compute != dtype:
                with torch.autocast(a.device.type, enabled=False):
                    return (a.to(compute) @ b.to(compute)).to(dtype)
    return a @ b


# Typical numbers, for products by the additions that make an output, for gradients by those that a spike takes part in.
# Measured with AVX-512, where float32, dense and by events, is as fast as with AVX2; dense bfloat16 is twice as fast.
_PRODUCTS = {torch.float32: BreakEven(0.6, 65), torch.bfloat16: BreakEven(0.3, 100)}
_GRADIENTS = {torch.float32: BreakEven(0.48, 90), torch.bfloat16: BreakEven(0.22, 45)}

# Inputs [M, C, H, W] of the products that are timed, and C'; as many multiply-adds by 1x1 as by 3x3 kernels.
_TIMED = {1: (((64, 96, 8, 8), 384), ((64, 384, 8, 8), 384)), 3: (((16, 48, 16, 16), 96), ((16, 192, 8, 8), 192))}


def _break_even(dtype: torch.dtype, side: int, gradient: bool) -> BreakEven:
    """Where training breaks even on this machine."""
    name = str(dtype).removeprefix("torch.")
    kind = f"training {name}, {'gradients' if gradient else 'products'}, {side}x{side}"
    typical = (_GRADIENTS if gradient else _PRODUCTS)[dtype]
    if side not in _TIMED:
        return typical
    return break_even(kind, typical, lambda: [_timed(*sizes, dtype, side, gradient) for sizes in _TIMED[side]])


def _timed(shape: tuple[int, ...], outputs: int, dtype: torch.dtype, side: int, gradient: bool) -> Timed:
    """A training step's product, or the gradient of its weights, as `_Convolve` runs them."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(outputs, shape[1], side, side, generator=generator).to(dtype)
    noise = torch.rand(shape, generator=generator)
    inputs = [(noise < density).to(dtype).contiguous(memory_format=torch.channels_last) for density in DENSITIES]
    if not gradient:
        events_of = [partial(_event_products, x, weight, None, 1) for x in inputs]
        return Timed(weight[0].numel(), events_of, partial(F.conv2d, inputs[0], weight, None, 1, side // 2))
    grad = torch.randn(shape[0], outputs, *shape[2:], generator=generator).to(dtype)
    grad = grad.contiguous(memory_format=torch.channels_last)
    spikes = [x.to(torch.uint8, memory_format=torch.preserve_format) for x in inputs]
    dense = partial(_dense_gradients, grad, inputs[0], weight, side // 2)
    return Timed(weight[:, 0].numel(), [partial(_event_weight_gradient, x, grad, weight) for x in spikes], dense)


def _dense_gradients(grad: Tensor, x: Tensor, weight: Tensor, padding: int) -> Any:
    args = ([1, 1], [padding] * 2, [1, 1], False, [0, 0], 1, [False, True, False])
    return torch.ops.aten.convolution_backward(grad, x, weight, None, *args)


def _choose(x: Tensor, packed: PackedTensor | None, weight: Tensor, stride: list[int], conv: _Conv) -> _Choice:
    """What to compute event by event.

    Args:
        x: Input of the convolution, [M, C, H, W].
        packed: The same, packed, before subsampling; None if it is not known to be spikes or their sums.
        weight: In the precision in which it is computed, [C', C, k, k].
        stride: Of the convolution once x is subsampled.
        conv: The convolution.
    """
    outputs, channels, side, width = weight.shape
    fits = (
        packed is not None
        and packed.numbers.low == 0
        and conv.groups == 1
        and weight.dtype in _PRODUCTS
        and channels <= events.MOST_CHANNELS
        and outputs % events.LEAST_OUTPUTS == 0
        and side == width
        and side % 2 == 1
        and conv.padding == [side // 2] * 2
        and conv.dilation == [1, 1]
        and stride[0] == stride[1]
    )
    if not fits or not may_run(x):
        return _Choice()
    assert packed is not None
    # A sum of spikes above one is one event, and counts as several here: cheaper than looking for them.
    spikes = packed.spikes if x.numel() == packed.shape.numel() else None
    density = (x.sum(dtype=torch.float32).item() if spikes is None else spikes) / x.numel()
    if not training_kernels_pay():
        if current_policy().kernels == "auto" and density < _PRODUCTS[weight.dtype].most:
            count_training_work(x.numel() // stride[0] ** 2 * weight[:, 0].numel())
        return _Choice()
    if not events.can_train(x):
        return _Choice()
    return _Choice(
        _break_even(weight.dtype, side, gradient=False).holds(density, channels * side**2),
        stride[0] == 1 and _break_even(weight.dtype, side, gradient=True).holds(density, outputs * side**2),
    )


def _event_products(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int) -> Tensor:
    """The convolution of spikes x [M, C, H, W] event by event, in the weights' dtype and channels-last memory."""
    bias = weight.new_zeros(len(weight)) if bias is None else bias
    weights = events.EventWeights(weight, bias, None, stride)
    return weights.currents(x.permute(0, 2, 3, 1).to(torch.uint8), dtype=weight.dtype).permute(0, 3, 1, 2)


def _event_weight_gradient(x: Tensor, grad: Tensor, weight: Tensor) -> Tensor:
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


def max_pool(x: Tensor) -> Tensor:
    """3x3 max pooling of stride 2 and padding 1 on [T * B, C, H, W]."""
    result: Tensor = _MaxPool.apply(x.contiguous(memory_format=torch.channels_last))
    return result


class _MaxPool(torch.autograd.Function):
    """Keeps four bits for each output: the place of the largest element in its window, 0 to 8."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        result, _, places = pooled_places(x)
        ctx.save_for_backward(places.data)
        ctx.places = places.without_data()
        ctx.shape, ctx.dtype = x.shape, x.dtype
        return result

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Tensor:
        refuse_second_derivatives()
        places = ctx.places._replace(data=ctx.saved_tensors[0])
        return gradient_of_places(grad_outputs[0], index_of(places, ctx.shape[3]), ctx.shape, ctx.dtype)


_PLACES = counts(8)


def pooled_places(x: Tensor) -> tuple[Tensor, Tensor, PackedTensor]:
    """`max_pool` of x in channels-last memory, where in its image each result was, and where in its window, 0 to 8."""
    result, index = F.max_pool2d(x, 3, 2, 1, return_indices=True)
    row, column = _window_corners(result)
    places = (index.div(x.shape[3], rounding_mode="floor") - row) * 3 + (index % x.shape[3] - column)
    packed = pack(places.to(torch.uint8), _PLACES)
    assert packed is not None
    return result, index, packed


def at_places(x: Tensor, index: Tensor) -> Tensor:
    """What x [M, C, H, W] has at `index`, [M, C, H', W'] in its images, in channels-last memory as x is."""
    M, C, H, W = x.shape
    found = x.permute(0, 2, 3, 1).reshape(M, H * W, C).gather(1, index.permute(0, 2, 3, 1).reshape(M, -1, C))
    return found.unflatten(1, index.shape[2:]).permute(0, 3, 1, 2)


def gradient_of_places(grad: Tensor, index: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """The pooling's gradient: from that of its result, which was at `index`, to that of its input, of this shape."""
    # Of its input the pooling's gradient reads the shape and the memory format alone.
    like = torch.empty(shape, dtype=dtype, device=grad.device, memory_format=torch.channels_last)
    grad = grad.contiguous(memory_format=torch.channels_last)
    index = index.contiguous(memory_format=torch.channels_last)
    gradient: Tensor = torch.ops.aten.max_pool2d_with_indices_backward(
        grad, like, [3, 3], [2, 2], [1, 1], [1, 1], False, index
    )
    return gradient


def index_of(packed: PackedTensor, width: int) -> Tensor:
    """Places in windows as indices into an image so wide."""
    places = unpack(packed, torch.uint8)
    row, column = _window_corners(places)
    return (places // 3 + row) * width + (places % 3 + column)


def _window_corners(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows [H, 1] and columns [W] of the input at which the windows of the output [..., H, W] begin."""
    row, column = (2 * torch.arange(size, device=x.device) - 1 for size in x.shape[2:])
    return row[:, None], column
