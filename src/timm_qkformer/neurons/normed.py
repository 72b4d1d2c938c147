"""Batch norm, perhaps max pooling, and neurons in one step that keeps the convolution's output and where maxima were.

autograd keeps the input of each. Here the normalised currents, potentials and the surrogate's derivative are computed
again from the batch norm's input in the backward pass, all in one kernel (`compiled`). Values and gradients are those
of the two modules, but for the order of sums. There are no second derivatives.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..execution.convolution import at_places, gradient_of_places, index_of, pooled_places
from ..execution.packing import refuse_second_derivatives, remember
from ..execution.policy import current_policy
from .compiled import alias, compiled_gradients, compiled_spikes
from .recurrence import Affine, fire_steps, gradient_steps, scale_and_shift
from .spec import NeuronSpec


class _Norm(NamedTuple):
    """A batch norm's settings and state for one call."""

    training: bool  # normalise by the batch's statistics
    momentum: float
    eps: float
    running_mean: Tensor | None
    running_var: Tensor | None


def norm_and_fire(y: Tensor, bn: nn.BatchNorm2d, spec: NeuronSpec, steps: int, pool: bool = False) -> Tensor:
    """Neurons after a batch norm, starting from rest.

    Args:
        y: Convolution's output [T * B, C, H, W].
        bn: Batch norm with weight and bias; its statistics move as in its own forward pass.
        spec: The neurons, of other than real levels.
        steps: Time steps T.
        pool: Pool the normalised currents before the neurons, as `execution.convolution.max_pool` does.

    Returns:
        Spikes [T, B, C, H, W], or of the pooled size, in channels-last memory.
    """
    y = y.contiguous(memory_format=torch.channels_last)
    backend = current_policy().neurons
    packed: list[Tensor] = []
    norm = _norm_of(bn)
    result: Tensor = _NormAndFire.apply(y, bn.weight, bn.bias, spec.leak, steps, pool, norm, spec, backend, packed)
    for data in packed:
        remember(result, data, spec.range)
    return result


def _norm_of(bn: nn.BatchNorm2d) -> _Norm:
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
    return _Norm(is_training, momentum, bn.eps, mean, var)


class _NormAndFire(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,
        weight: Tensor,
        bias: Tensor,
        leak: Tensor | float,
        steps: int,
        pool: bool,
        norm: _Norm,
        spec: NeuronSpec,
        backend: str,
        packed: list[Tensor],  # gets the spikes packed, if the kernel that makes them can do it
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
        source, places = y, None
        if pool:
            _, index, places = pooled_places(_normalised(y, affine))
            source = at_places(y, index)
            del index  # eight bytes an element
        rows = _rows(source, steps)
        compiled = compiled_spikes(rows, spec, backend, affine, numbers=spec.range)
        if compiled is not None:
            spikes = compiled.spikes
            packed += [] if compiled.packed is None else [compiled.packed]
        else:
            spikes = torch.empty_like(rows)
            for t, fired in enumerate(fire_steps(scale_and_shift(rows.unbind(0), affine), spec)[0]):
                spikes[t] = fired
        has_leak = isinstance(leak, Tensor)
        more = [*([leak] if has_leak else []), *([] if places is None else [places.data])]
        ctx.save_for_backward(y, weight, mean, invstd, *affine, *more)
        ctx.has_leak, ctx.places = has_leak, None if places is None else places.without_data()
        ctx.spec = spec._replace(leak=None) if has_leak else spec
        # Not the running statistics, which the backward pass has no use for and other passes modify.
        ctx.training, ctx.eps, ctx.steps, ctx.backend = norm.training, norm.eps, steps, backend
        return _images(spikes, source)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivatives()
        y, weight, mean, invstd, scale, shift, *more = ctx.saved_tensors
        spec = ctx.spec._replace(leak=more.pop(0)) if ctx.has_leak else ctx.spec
        places = None if ctx.places is None else ctx.places._replace(data=more[0])
        index = None if places is None else index_of(places, y.shape[3])
        source = y if index is None else at_places(y, index)
        leak_gradient = ctx.needs_input_grad[3]
        affine, rows = Affine(scale, shift), _rows(source, ctx.steps)
        images = grad_outputs[0].flatten(0, 1).contiguous(memory_format=torch.channels_last)
        grad_spikes = _rows(images, ctx.steps)
        compiled = compiled_gradients(grad_spikes, rows, spec, leak_gradient, ctx.backend, affine)
        if compiled is not None:
            grad_rows, grad_leak, _ = compiled
        else:
            currents = scale_and_shift(rows.unbind(0), affine)
            grads = gradient_steps(grad_spikes.unbind(0), currents, spec, leak_gradient)
            grad_rows = torch.stack([grad.to(y.dtype) for grad in grads.currents])
            grad_leak = None if grads.leak is None else grads.leak.sum()
        grad_images = _images(grad_rows, source).flatten(0, 1)
        if index is not None:
            grad_images = gradient_of_places(grad_images, index, y.shape, y.dtype)
        var = 1.0 / invstd.square()  # stands in for the running variance, from which eval mode's invstd comes
        grad_y, grad_weight, grad_bias = torch.ops.aten.native_batch_norm_backward(
            grad_images,
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
        return grad_y, grad_weight, grad_bias, grad_leak, *[None] * 6


def _normalised(y: Tensor, affine: Affine) -> Tensor:
    """[T * B, C, H, W] as its batch norm makes it, in the membrane's precision."""
    (steps,) = scale_and_shift([y.permute(0, 2, 3, 1)], affine)
    return steps.permute(0, 3, 1, 2)


def _rows(y: Tensor, steps: int) -> Tensor:
    """[T * B, C, H, W] in channels-last memory as [T, B * H * W, C]."""
    return y.permute(0, 2, 3, 1).reshape(steps, -1, y.shape[1])


def _images(rows: Tensor, y: Tensor) -> Tensor:
    """`_rows` undone, as [T, B, C, H, W]. Not a view, so that it may be modified in place."""
    T = rows.shape[0]
    N, C, H, W = y.shape
    return alias(rows, (T, N // T, C, H, W), (N // T * C * H * W, C * H * W, 1, W * C, C))
