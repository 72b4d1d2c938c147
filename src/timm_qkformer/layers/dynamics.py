"""Multi-step dynamics of integrate-and-fire neurons, as pure functions of the input current.

Everything a neuron of this package does is in this file: a whole sequence ``[T, ...]`` of input currents
goes in, a sequence of spikes of the same shape comes out, and no state survives the call.

Equations, for t = 1..T, with the membrane potential measured from rest (``V[0] = 0``), ``leak`` = 1 / tau
(0: perfect integrator) and ``threshold`` = V_th - V_reset:

    charge   H[t] = V[t-1] + leak * (X[t] - V[t-1])     if decay_input
             H[t] = V[t-1] - leak * V[t-1] + X[t]       otherwise
    fire     S[t] = 1 if H[t] >= threshold else 0
    reset    V[t] = (1 - S[t]) * H[t]                   hard
             V[t] = H[t] - threshold * S[t]             soft

Measuring from rest makes a non-zero V_reset a mere shift of the threshold. In the backward pass dS/dH is the
derivative of the surrogate; with ``detach_reset`` the S in the reset counts as a constant. Potentials are
float32 for half-precision inputs and have the input's own precision otherwise.

Source: Fang et al., "Incorporating Learnable Membrane Time Constant to Enhance Learning of Spiking Neural
Networks" (arXiv 2007.05785), eq. 1 to 5 and 9; QKFormer (arXiv 2403.16552), eq. 1 to 3.

``integrate_and_fire_reference`` is the written-out recurrence under autograd: readable and scriptable, the
yardstick for every faster path. ``integrate_and_fire`` computes the same spikes and the same gradients while
keeping nothing for the backward pass but its input.
"""

from typing import Any

import torch
from torch import Tensor

from .surrogate import surrogate_derivative, surrogate_primitive

__all__ = ["integrate_and_fire", "integrate_and_fire_reference", "membrane_dtype"]


def membrane_dtype(x: Tensor) -> torch.dtype:
    """Precision of potentials and of spike counts for spikes of x's dtype: never below float32."""
    if x.dtype == torch.float16 or x.dtype == torch.bfloat16:
        return torch.float32
    return x.dtype


def _charge(v: Tensor, x: Tensor, leak: Tensor, decay_input: bool) -> Tensor:
    if decay_input:
        return v + (x - v) * leak
    return v - v * leak + x


def integrate_and_fire_reference(
    x: Tensor,
    leak: Tensor,
    threshold: float = 1.0,
    soft_reset: bool = False,
    decay_input: bool = True,
    detach_reset: bool = True,
    surrogate: str = "sigmoid",
    alpha: float = 4.0,
) -> Tensor:
    """The equations above, one step after the other, differentiated by autograd.

    Args and result as in `integrate_and_fire`.
    """
    dtype = membrane_dtype(x)
    v = torch.zeros_like(x[0], dtype=dtype)
    spikes: list[Tensor] = []
    for x_t in x.to(dtype).unbind(0):
        h = _charge(v, x_t, leak, decay_input)
        # Value: the step function, exactly. Gradient: the surrogate's.
        primitive = surrogate_primitive(h - threshold, surrogate, alpha)
        s = (h >= threshold).to(dtype) + (primitive - primitive.detach())
        reset = s.detach() if detach_reset else s
        v = h - threshold * reset if soft_reset else (1.0 - reset) * h
        spikes.append(s.to(x.dtype))
    return torch.stack(spikes)


class _IntegrateAndFire(torch.autograd.Function):
    """Spikes of the reference; its gradient written out, with the potentials computed again from the input."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        leak: Tensor | float,
        threshold: float,
        soft_reset: bool,
        decay_input: bool,
        detach_reset: bool,
        surrogate: str,
        alpha: float,
    ) -> Tensor:
        if isinstance(leak, Tensor):
            ctx.save_for_backward(x, leak)
        else:
            ctx.save_for_backward(x)
            ctx.leak = leak
        ctx.options = (threshold, soft_reset, decay_input, detach_reset, surrogate, alpha)
        spikes = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        v = torch.zeros(x.shape[1:], dtype=membrane_dtype(x), device=x.device)
        for t in range(x.shape[0]):
            h = _charge(v, x[t].to(v.dtype), leak, decay_input)  # type: ignore[arg-type]
            fired = h >= threshold
            spikes[t] = fired
            v = _reset(h, fired, threshold, soft_reset)
        return spikes

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (grad_spikes,) = grad_outputs
        saved = ctx.saved_tensors  # once: activation checkpointing refuses a second look
        x = saved[0]
        leak = saved[1] if len(saved) > 1 else ctx.leak
        threshold, soft_reset, decay_input, detach_reset, surrogate, alpha = ctx.options
        steps = x.shape[0]
        dtype = membrane_dtype(x)

        before = [torch.zeros(x.shape[1:], dtype=dtype, device=x.device)]  # V[t-1]
        charged = []  # H[t]
        for t in range(steps):
            h = _charge(before[-1], x[t].to(dtype), leak, decay_input)
            charged.append(h)
            if t + 1 < steps:
                before.append(_reset(h, h >= threshold, threshold, soft_reset))

        grad_x = [torch.empty(0)] * steps
        grad_leak: Tensor | None = None
        grad_v: Tensor | None = None  # dL/dV[t]
        for t in reversed(range(steps)):
            h = charged[t]
            ds_dh = surrogate_derivative(h - threshold, surrogate, alpha)
            grad_h = grad_spikes[t].to(dtype) * ds_dh
            if grad_v is not None:
                dv_dh = torch.ones_like(h) if soft_reset else (h < threshold).to(dtype)
                if not detach_reset:
                    dv_dh = dv_dh - (threshold if soft_reset else h) * ds_dh
                grad_h = grad_h + grad_v * dv_dh
            grad_v = grad_h - grad_h * leak
            grad_x[t] = (grad_h * leak if decay_input else grad_h).to(x.dtype)
            if ctx.needs_input_grad[1]:
                dh_dleak = x[t].to(dtype) - before[t] if decay_input else -before[t]
                step = (grad_h * dh_dleak).sum()
                grad_leak = step if grad_leak is None else grad_leak + step
        return torch.stack(grad_x), grad_leak, None, None, None, None, None, None


def _reset(h: Tensor, fired: Tensor, threshold: float, soft: bool) -> Tensor:
    return h - threshold * fired.to(h.dtype) if soft else h.masked_fill(fired, 0.0)


def integrate_and_fire(
    x: Tensor,
    leak: Tensor | float,
    threshold: float = 1.0,
    soft_reset: bool = False,
    decay_input: bool = True,
    detach_reset: bool = True,
    surrogate: str = "sigmoid",
    alpha: float = 4.0,
) -> Tensor:
    """Run a layer of integrate-and-fire neurons over a whole sequence, starting from rest.

    Args:
        x: Input currents [T, ...], floating point, T >= 1.
        leak: 1 / tau in [0, 1], a float or a tensor without dimensions (which then gets a gradient).
        threshold: Distance from the resting to the firing potential, V_th - V_reset.
        soft_reset: Subtract the threshold on a spike instead of returning to rest.
        decay_input: Scale the input current by the leak, too.
        detach_reset: Treat the spike in the reset as a constant in the backward pass.
        surrogate: "sigmoid" or "atan", see `surrogate`.
        alpha: Steepness of the surrogate.

    Returns:
        Spikes, 0 or 1, of the shape and dtype of `x`.
    """
    return _IntegrateAndFire.apply(x, leak, threshold, soft_reset, decay_input, detach_reset, surrogate, alpha)
