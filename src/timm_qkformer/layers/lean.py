"""The lean training step: the same network, keeping a fraction of the memory for the backward pass.

What autograd keeps of a unit conv, BN, [pool], LIF is the convolution's input, the batch norm's, the pooling's with
64-bit indices, and the neurons': five bytes or more where one would do. Here

    convolution   keeps its input packed, 1 to 8 bits an element, where that is spikes or spike sums (`counts`)
    BN + LIF      keep the convolution's output alone; normalised currents, potentials and the surrogate's derivative
                  are computed again, all in one kernel (`fused`)
    max pooling   keeps which of its window's nine elements was the largest, a byte for each output
    Q-K attention and spiking self-attention keep packed spikes

On CPUs, convolutions of few spikes add them up event by event (`event_training`).

Values and gradients are those of the plain modules, but for the order of sums. `ConvNorm` and the attention layers take
these functions by themselves while a model trains; `lean_training(False)` and the environment variable
TIMM_QKFORMER_LEAN_TRAINING=0 make them run the plain modules. These run, too, wherever they must: under torch.compile,
export, FX, TorchScript and torch.func, with modules replaced, hooked or parametrised, in inference, and with
spikingjelly's neurons.

There are no second derivatives through this path; it says so when asked for one.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as module_globals

from .backend import current_lif_backend
from .counts import counts_bound, note_counts, packed, unpack
from .event_training import Choice, choose, event_products, event_weight_gradient
from .fused import alias, fused_gradients, fused_spikes, is_watched
from .neurons import IF, LIF, ParametricLIF, SpikingNeuron
from .recurrence import Affine, Dynamics, fire_steps, gradient_steps, membrane_dtype, scale_and_shift

__all__ = [
    "ENVIRONMENT_VARIABLE",
    "LeanModule",
    "conv_keeps_counts",
    "conv_runs_plainly",
    "gate_keeps_counts",
    "is_lean",
    "is_lean_training",
    "lean_training",
    "mix_keeps_counts",
    "norm_and_fire",
    "norm_fires",
    "pool_keeps_places",
    "pool_runs_plainly",
    "runs_plainly",
]

ENVIRONMENT_VARIABLE = "TIMM_QKFORMER_LEAN_TRAINING"

_of_block: ContextVar[bool | None] = ContextVar("lean_training", default=None)


@contextmanager
def lean_training(enabled: bool = True) -> Iterator[None]:
    """Whether models may take the lean path in training: in this block, in this thread (or asyncio task) alone."""
    token = _of_block.set(enabled)
    try:
        yield
    finally:
        _of_block.reset(token)


def is_lean_training() -> bool:
    """Whether a model called here and now may take the lean path when it trains.

    Raises:
        ValueError: If the environment variable decides and is neither 0 nor 1.
    """
    of_block = _of_block.get()
    if of_block is not None:
        return of_block
    value = os.environ.get(ENVIRONMENT_VARIABLE) or "1"
    if value not in ("0", "1"):
        raise ValueError(f"environment variable {ENVIRONMENT_VARIABLE}={value!r} must be 0 or 1")
    return value == "1"


_DEVICES = ("cpu", "cuda", "xpu")  # that torch has batch_norm_update_stats for


def is_lean(x: Tensor, module: nn.Module) -> bool:
    """Whether `module`, called with `x` here and now, is to save memory for a backward pass."""
    return (
        torch.is_grad_enabled()
        and module.training
        and type(x) is Tensor  # no FX proxies, which answer nothing
        and x.is_floating_point()
        and x.device.type in _DEVICES
        and x.numel() > 0
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        and not torch._C._are_functorch_transforms_active()
        and not is_watched(x)  # last: code that is being compiled cannot ask
        and is_lean_training()
        and current_lif_backend() != "spikingjelly"
    )


class LeanModule(nn.Module):
    """A module that has a lean path besides its plain one."""

    def is_lean(self, x: Tensor) -> bool:
        """`is_lean`; never in TorchScript, which compiles neither it nor methods that are `torch.jit.unused`."""
        if torch.jit.is_scripting():
            return False
        return is_lean(x, self)


def runs_plainly(module: nn.Module, *classes: type[nn.Module]) -> bool:
    """Whether calling `module` does what one of `classes` does and nothing else: no hook wants to see it."""
    return type(module) in classes and not (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or module_globals._global_forward_hooks
        or module_globals._global_forward_pre_hooks
        or module_globals._global_backward_hooks
        or module_globals._global_backward_pre_hooks
        or "forward" in vars(module)
    )


def conv_runs_plainly(module: nn.Module) -> bool:
    """Whether `conv_keeps_counts` may take a convolution's place."""
    if not runs_plainly(module, nn.Conv2d):
        return False
    assert isinstance(module, nn.Conv2d)
    return module.padding_mode == "zeros" and not isinstance(module.padding, str)


def pool_runs_plainly(module: nn.Module) -> bool:
    """Whether `pool_keeps_places` may take a pooling's place."""
    if not runs_plainly(module, nn.MaxPool2d):
        return False
    assert isinstance(module, nn.MaxPool2d)
    sides = (_both(value) for value in (module.kernel_size, module.stride, module.padding, module.dilation))
    return (*sides, module.ceil_mode, module.return_indices) == ((3, 3), (2, 2), (1, 1), (1, 1), False, False)


def _both(value: int | tuple[int, ...]) -> tuple[int, ...]:
    return (value, value) if isinstance(value, int) else tuple(value)


def _refuse_second_derivatives() -> None:
    if torch.is_grad_enabled():
        raise RuntimeError(
            "the lean training path has no second derivatives (create_graph=True): run the forward pass within "
            "`with timm_qkformer.layers.lean_training(False):`"
        )


def _compute_dtype(x: Tensor, dtype: torch.dtype) -> torch.dtype:
    """Precision in which products of `dtype` are summed up fastest without being less exact."""
    if x.device.type == "cpu" and dtype in _HALF and not _cpu_multiplies(dtype):
        return torch.float32
    return dtype


_HALF = (torch.bfloat16, torch.float16)


@lru_cache
def _cpu_multiplies(dtype: torch.dtype) -> bool:
    # Without instructions for it torch falls back to loops that take ten times as long as float32.
    query = "_is_mkldnn_bf16_supported" if dtype == torch.bfloat16 else "_is_mkldnn_fp16_supported"
    supported = getattr(torch.ops.mkldnn, query, None)
    return supported is None or bool(supported())


def _autocast_dtype(x: Tensor) -> torch.dtype:
    """Precision of a matrix product's operands: autocast's, if it is on."""
    device_type = x.device.type
    if x.dtype != torch.float64 and torch.is_autocast_enabled(device_type):
        return torch.get_autocast_dtype(device_type)
    return x.dtype


class _Conv(NamedTuple):
    stride: list[int]
    padding: list[int]
    dilation: list[int]
    groups: int


class _ConvKeepsCounts(torch.autograd.Function):
    """Convolution in channels-last memory that keeps its input as packed counts, if `bound` says that it is such."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, data: Tensor | None, weight: Tensor, bias: Tensor | None, bound: int, conv: _Conv
    ) -> Tensor:
        dtype = _autocast_dtype(x)
        ctx.conv, ctx.bound, ctx.shape = conv, bound, x.shape
        ctx.dtypes = x.dtype, dtype, None if bias is None else bias.dtype
        ctx.sampled = _samples(weight, conv, x)
        x = _every(x, conv) if ctx.sampled else x
        x = x.to(dtype)
        needs_x = ctx.needs_input_grad[2]
        ctx.save_for_backward(weight, *([x if data is None else data] if needs_x else []))
        compute = _compute_dtype(x, dtype)
        w = weight.to(dtype).to(compute)
        b = None if bias is None else bias.to(dtype).to(compute)
        ctx.stride = [1, 1] if ctx.sampled else conv.stride
        are_counts = bound > 0 and conv.groups == 1
        ctx.events = choose(x, w, ctx.stride, conv.padding, conv.dilation) if are_counts else Choice()
        if ctx.events.products:
            return event_products(x, w, b, ctx.stride[0]).to(dtype)
        with torch.autocast(x.device.type, enabled=False):
            y = F.conv2d(x.to(compute), w, b, ctx.stride, conv.padding, conv.dilation, conv.groups)
        return y.to(dtype)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        _refuse_second_derivatives()
        weight, *saved = ctx.saved_tensors
        x_dtype, dtype, bias_dtype = ctx.dtypes
        compute = _compute_dtype(weight, dtype)
        conv = ctx.conv
        needs_x, _, needs_w, needs_b = ctx.needs_input_grad[:4]
        grad = grad_outputs[0].to(compute)
        w = weight.to(dtype).to(compute)
        grad_w = None
        if ctx.events.weight_gradient and needs_w:
            spikes = unpack(saved.pop(), ctx.bound, ctx.shape, torch.uint8)
            grad_w = event_weight_gradient(_every(spikes, conv) if ctx.sampled else spikes, grad, w)
            needs_w = False
        if saved and ctx.bound == 0:
            x = saved[0].to(compute)
        else:
            if saved:
                x = unpack(saved[0], ctx.bound, ctx.shape, compute)
            else:  # of the input, the shape and the memory format alone are asked for
                x = torch.empty(ctx.shape, dtype=compute, device=weight.device, memory_format=torch.channels_last)
            x = _every(x, conv) if ctx.sampled else x
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
        if ctx.sampled and needs_x:
            whole = torch.empty(ctx.shape, dtype=compute, device=x.device, memory_format=torch.channels_last).zero_()
            whole[..., :: conv.stride[0], :: conv.stride[1]] = grads[0]
            grads = (whole, *grads[1:])
        grad_x, grad_w, grad_b = (
            None if grad is None else grad.to(dtype).to(wanted)
            for grad, wanted in zip(grads, (x_dtype, weight.dtype, bias_dtype), strict=True)
        )
        return grad_x, None, grad_w, grad_b, None, None


def _samples(weight: Tensor, conv: _Conv, x: Tensor) -> bool:
    """Whether the convolution is to see every n-th pixel, with stride 1, instead of all of them with stride n.

    The same numbers. On CPUs, oneDNN's gradients of strided 1x1 convolutions in channels-last memory write beyond
    their end with fewer channels than fit into a vector register (seen with torch 2.14 and AVX2: fewer than 8).
    """
    strided = weight.shape[2:] == (1, 1) and conv.stride != [1, 1] and conv.padding == [0, 0]
    return strided and x.device.type == "cpu"


def _every(x: Tensor, conv: _Conv) -> Tensor:
    return x[..., :: conv.stride[0], :: conv.stride[1]].contiguous(memory_format=torch.channels_last)


def conv_keeps_counts(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """`conv` on [T, B, C, H, W], to [T * B, C', H', W'] in channels-last memory, keeping `x` packed if it is noted."""
    images = x.flatten(0, 1).contiguous(memory_format=torch.channels_last)
    bound = counts_bound(x)
    data = packed(x) if bound is not None and conv.weight.requires_grad else None
    assert not isinstance(conv.padding, str)
    options = _Conv(list(conv.stride), list(conv.padding), list(conv.dilation), conv.groups)
    result: Tensor = _ConvKeepsCounts.apply(images, data, conv.weight, conv.bias, bound or 0, options)
    return result


class _Norm(NamedTuple):
    """A batch norm's settings and state for one call."""

    training: bool  # normalise by the batch's statistics
    momentum: float
    eps: float
    running_mean: Tensor | None
    running_var: Tensor | None


class _NormAndFire(torch.autograd.Function):
    """Batch norm and neurons on the convolution's output, which is all that is kept."""

    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,
        weight: Tensor,
        bias: Tensor,
        leak: Tensor | float,
        steps: int,
        norm: _Norm,
        dynamics: Dynamics,
        backend: str,
    ) -> Tensor:
        if norm.training:
            mean, var = torch.batch_norm_update_stats(y, norm.running_mean, norm.running_var, norm.momentum)
        else:
            assert norm.running_mean is not None
            assert norm.running_var is not None
            # Copies: another forward pass in training mode may change them before the backward pass.
            mean, var = norm.running_mean.clone(), norm.running_var.clone()
        invstd = 1.0 / torch.sqrt(var + norm.eps)
        scale = weight * invstd
        affine = Affine(scale, bias - mean * scale)
        rows = _rows(y, steps)
        spikes = fused_spikes(rows, leak, dynamics, backend, affine)
        if spikes is None:
            spikes = torch.empty_like(rows)
            for t, fired in enumerate(fire_steps(scale_and_shift(rows.unbind(0), affine), leak, dynamics)):
                spikes[t] = fired
        ctx.save_for_backward(y, weight, mean, invstd, *affine, *([leak] if isinstance(leak, Tensor) else []))
        ctx.leak = None if isinstance(leak, Tensor) else leak
        # Not the running statistics, which the backward pass has no use for and other passes modify.
        ctx.training, ctx.eps, ctx.steps, ctx.dynamics, ctx.backend = norm.training, norm.eps, steps, dynamics, backend
        return _images(spikes, y)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        _refuse_second_derivatives()
        y, weight, mean, invstd, scale, shift, *saved_leak = ctx.saved_tensors
        leak = saved_leak[0] if saved_leak else ctx.leak
        leak_gradient = ctx.needs_input_grad[3]
        affine, rows = Affine(scale, shift), _rows(y, ctx.steps)
        images = grad_outputs[0].flatten(0, 1).contiguous(memory_format=torch.channels_last)
        grad_spikes = _rows(images, ctx.steps)
        fused = fused_gradients(grad_spikes, rows, leak, ctx.dynamics, leak_gradient, ctx.backend, affine)
        if fused is not None:
            grads, grad_leak = fused
        else:
            currents = scale_and_shift(rows.unbind(0), affine)
            by_step, shares = gradient_steps(grad_spikes.unbind(0), currents, leak, ctx.dynamics, leak_gradient)
            grads = torch.stack([grad.to(y.dtype) for grad in by_step])
            grad_leak = None if shares is None else shares.sum()
        var = 1.0 / invstd.square()  # stands in for the running variance, from which eval mode's invstd comes
        grad_y, grad_weight, grad_bias = torch.ops.aten.native_batch_norm_backward(
            _images(grads, y).flatten(0, 1),
            y,
            weight,
            mean,
            var,
            mean,
            invstd,
            ctx.training,
            0.0,
            [*ctx.needs_input_grad[:3]],
        )
        return grad_y, grad_weight, grad_bias, grad_leak, None, None, None, None


def _rows(y: Tensor, steps: int) -> Tensor:
    """[T * B, C, H, W] in channels-last memory as [T, B * H * W, C]."""
    return y.permute(0, 2, 3, 1).reshape(steps, -1, y.shape[1])


def _images(rows: Tensor, y: Tensor) -> Tensor:
    """`_rows` undone, as [T, B, C, H, W]. Not a view, so that it may be modified in place."""
    T = rows.shape[0]
    N, C, H, W = y.shape
    return alias(rows, (T, N // T, C, H, W), (N // T * C * H * W, C * H * W, 1, W * C, C))


def norm_fires(bn: nn.Module, neuron: nn.Module, y: Tensor) -> bool:
    """Whether `norm_and_fire` may take the place of these two modules on y [T * B, C, H, W]."""
    if not (runs_plainly(bn, nn.BatchNorm2d) and runs_plainly(neuron, LIF, IF, ParametricLIF)):
        return False
    assert isinstance(bn, nn.BatchNorm2d)
    if bn.weight is None or bn.bias is None:
        return False
    return bn.weight.dtype == membrane_dtype(y) and y.numel() > y.shape[1]


def norm_and_fire(y: Tensor, bn: nn.BatchNorm2d, neuron: nn.Module, steps: int) -> Tensor:
    """neuron(bn(y)): convolution's output [T * B, C, H, W] to spikes [T, B, C, H, W] in channels-last memory."""
    assert isinstance(neuron, SpikingNeuron)
    is_training = bn.training or bn.running_mean is None
    momentum = 0.0 if bn.momentum is None else bn.momentum
    mean, var = bn.running_mean, bn.running_var
    if bn.training and bn.track_running_stats:
        if bn.num_batches_tracked is not None:
            bn.num_batches_tracked.add_(1)
            if bn.momentum is None:
                momentum = 1.0 / float(bn.num_batches_tracked)
    elif bn.training:
        mean = var = None
    norm = _Norm(is_training, momentum, bn.eps, mean, var)
    y = y.contiguous(memory_format=torch.channels_last)
    leak = neuron.leak_at(membrane_dtype(y))
    spikes = _NormAndFire.apply(y, bn.weight, bn.bias, leak, steps, norm, neuron.dynamics(), current_lif_backend())
    return note_counts(spikes, 1)


class _PoolKeepsPlaces(torch.autograd.Function):
    """3x3 max pooling, stride 2, padding 1, that keeps a byte for each output: the largest element's place, 0 to 8."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        result, index = F.max_pool2d(x, 3, 2, 1, return_indices=True)
        row, column = _window_corners(result)
        places = (index.div(x.shape[3], rounding_mode="floor") - row) * 3 + (index % x.shape[3] - column)
        ctx.save_for_backward(places.to(torch.uint8))
        ctx.shape, ctx.dtype = x.shape, x.dtype
        return result

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Tensor:
        _refuse_second_derivatives()
        (grad,) = grad_outputs
        (places,) = ctx.saved_tensors
        row, column = _window_corners(places)
        index = (places // 3 + row) * ctx.shape[3] + (places % 3 + column)
        # Of its input the pooling's gradient reads the shape and the memory format alone.
        like = torch.empty(ctx.shape, dtype=ctx.dtype, device=grad.device, memory_format=torch.channels_last)
        grad = grad.contiguous(memory_format=torch.channels_last)
        index = index.contiguous(memory_format=torch.channels_last)
        gradient: Tensor = torch.ops.aten.max_pool2d_with_indices_backward(
            grad, like, [3, 3], [2, 2], [1, 1], [1, 1], False, index
        )
        return gradient


def _window_corners(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows [H, 1] and columns [W] of the input at which the windows of the output [..., H, W] begin."""
    row, column = (2 * torch.arange(size, device=x.device) - 1 for size in x.shape[2:])
    return row[:, None], column


def pool_keeps_places(x: Tensor) -> Tensor:
    """3x3 max pooling of stride 2 and padding 1 on [T * B, C, H, W]."""
    result: Tensor = _PoolKeepsPlaces.apply(x.contiguous(memory_format=torch.channels_last))
    return result


class _Heads(NamedTuple):
    """How channels-last images [T, B, C, H, W] split into heads."""

    shape: torch.Size
    heads: int

    def rows(self, x: Tensor) -> Tensor:
        """[T, B, C, H, W] as [T, B, H * W, heads, C / heads], which is the order of its memory."""
        return x.permute(0, 1, 3, 4, 2).flatten(2, 3).unflatten(3, [self.heads, -1])

    def images(self, rows: Tensor) -> Tensor:
        """`rows` undone."""
        return rows.flatten(3).unflatten(2, self.shape[3:]).permute(0, 1, 4, 2, 3)

    def split(self, x: Tensor) -> Tensor:
        """[T, B, C, H, W] as [T, B, heads, C / heads, H * W]."""
        return self.rows(x).permute(0, 1, 3, 4, 2)

    def merge(self, x: Tensor) -> Tensor:
        """`split` undone."""
        return self.images(x.permute(0, 1, 4, 2, 3))


class _GateKeepsCounts(torch.autograd.Function):
    """gate * spikes, keeping the spikes packed."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, spikes: Tensor, data: Tensor, heads: _Heads, dim: int) -> Tensor:
        ctx.save_for_backward(gate, data)
        ctx.heads, ctx.dim = heads, dim
        # As [T, B, tokens, heads, channels].
        return heads.images(gate.permute(0, 1, 4, 2, 3).to(spikes.dtype) * heads.rows(spikes))

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        _refuse_second_derivatives()
        gate, data = ctx.saved_tensors
        heads = ctx.heads
        grad = heads.rows(grad_outputs[0])
        spikes = heads.rows(unpack(data, 1, heads.shape, grad.dtype))
        grad_spikes = heads.images(grad * gate.permute(0, 1, 4, 2, 3).to(grad.dtype))
        summed = 4 if ctx.dim == 3 else 2
        grad_gate = (grad * spikes).sum(summed, keepdim=True, dtype=gate.dtype).permute(0, 1, 3, 4, 2)
        return grad_gate, grad_spikes, None, None, None


def gate_keeps_counts(gate: Tensor, spikes: Tensor, heads: int, dim: int) -> Tensor:
    """gate * spikes: [T, B, C, H, W] to the same in channels-last memory.

    Args:
        gate: Spikes [T, B, heads, C / heads, H * W] with a 1 in place of dimension `dim`, 3 or 4.
        spikes: Noted as spikes.
        heads: Attention heads.
        dim: The dimension that the gate is broadcast over.
    """
    result: Tensor = _GateKeepsCounts.apply(gate, spikes, packed(spikes), _Heads(spikes.shape, heads), dim)
    return note_counts(result, 1)


class _MixKeepsCounts(torch.autograd.Function):
    """Spiking self-attention's product (V K^T) Q * scale, keeping packed spikes."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, data: list[Tensor], heads: _Heads, scale: float) -> Tensor:
        dtype = _autocast_dtype(q)
        compute = _compute_dtype(q, dtype)
        ctx.save_for_backward(*data)
        ctx.heads, ctx.dtypes, ctx.scale = heads, (q.dtype, dtype), scale
        with torch.autocast(q.device.type, enabled=False):
            q, k, v = (heads.split(spikes).to(compute) for spikes in (q, k, v))
            kv = (v @ k.transpose(-2, -1)).to(dtype).to(compute)
            return (kv @ q).to(dtype) * scale

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        _refuse_second_derivatives()
        heads, (spike_dtype, dtype) = ctx.heads, ctx.dtypes
        device_type = grad_outputs[0].device.type
        compute = _compute_dtype(grad_outputs[0], dtype)
        with torch.autocast(device_type, enabled=False):
            q, k, v = (heads.split(unpack(data, 1, heads.shape, compute)) for data in ctx.saved_tensors)
            kv = (v @ k.transpose(-2, -1)).to(dtype).to(compute)
            grad = (grad_outputs[0] * ctx.scale).to(compute)
            grad_kv = (grad @ q.transpose(-2, -1)).to(dtype).to(compute)
            grads = kv.transpose(-2, -1) @ grad, grad_kv.transpose(-2, -1) @ v, grad_kv @ k
        return *(heads.merge(g.to(dtype).to(spike_dtype)) for g in grads), None, None, None


def mix_keeps_counts(q: Tensor, k: Tensor, v: Tensor, heads: int, scale: float) -> Tensor:
    """(V K^T) Q * scale for noted spikes [T, B, C, H, W], to [T, B, heads, C / heads, H * W]."""
    data = [packed(spikes) for spikes in (q, k, v)]
    result: Tensor = _MixKeepsCounts.apply(q, k, v, data, _Heads(q.shape, heads), scale)
    return result
