"""Multi-step dynamics of integrate-and-fire neurons, as pure functions of the input current.

A whole sequence ``[T, ...]`` of input currents goes in, a sequence of spikes of the same shape comes out, and no
state survives the call.

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
keeping nothing for the backward pass but its input, on the backend that `set_lif_backend` chose.
"""

from typing import Any

import torch
from torch import Tensor

from .backend import current_lif_backend
from .fused import fused_gradients, fused_spikes, is_watched, like_steps
from .peers import spikingjelly_integrate_and_fire
from .recurrence import Dynamics, charge, fire_steps, gradient_steps, membrane_dtype
from .surrogate import surrogate_primitive

__all__ = ["integrate_and_fire", "integrate_and_fire_reference"]


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
        h = charge(v, x_t, leak, decay_input)
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
        dynamics: Dynamics,
        backend: str,
    ) -> Tensor:
        if isinstance(leak, Tensor):
            ctx.save_for_backward(x, leak)
        else:
            ctx.save_for_backward(x)
            ctx.leak = leak
        ctx.dynamics = dynamics
        ctx.backend = backend
        if backend == TRACED:
            return _join([fired.to(x.dtype) for fired in fire_steps(x.unbind(0), leak, dynamics)])
        spikes = fused_spikes(x, leak, dynamics, backend)
        if spikes is None:
            spikes = like_steps(x)
            for t, fired in enumerate(fire_steps(x.unbind(0), leak, dynamics)):
                spikes[t] = fired
        return spikes

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (grad_spikes,) = grad_outputs
        x, *saved_leak = ctx.saved_tensors  # once: activation checkpointing computes them again for every access
        leak = saved_leak[0] if saved_leak else ctx.leak
        leak_gradient = ctx.needs_input_grad[1]
        if ctx.backend != TRACED and not torch.is_grad_enabled():  # enabled: to be differentiated once more
            fused = fused_gradients(grad_spikes, x, leak, ctx.dynamics, leak_gradient, ctx.backend)
            if fused is not None:
                return *fused, None, None
        grads, leak_shares = gradient_steps(grad_spikes.unbind(0), x.unbind(0), leak, ctx.dynamics, leak_gradient)
        grad_leak = leak_shares.sum() if leak_shares is not None else None
        return _join([grad.to(x.dtype) for grad in grads]), grad_leak, None, None


def _join(steps: list[Tensor]) -> Tensor:
    """Steps [B, ...] to [T, B, ...]. Unlike `torch.stack`, `cat` keeps channels-last memory."""
    if steps[0].dim() == 0:
        return torch.stack(steps)
    return torch.cat(steps).unflatten(0, [len(steps), steps[0].shape[0]])


TRACED = "traced"  # not a backend to choose: the ops themselves, for somebody else's graph


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
        Spikes, 0 or 1, of the shape and dtype of `x`. The steps lie one behind the other; each is laid out as those
        of `x` if these are dense (contiguous, channels last, ...) and contiguous otherwise.
    """
    dynamics = Dynamics(threshold, soft_reset, decay_input, detach_reset, surrogate, alpha)
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return _IntegrateAndFire.apply(x, leak, dynamics, TRACED)
    if torch._C._are_functorch_transforms_active():  # differentiates and batches what autograd can
        return integrate_and_fire_reference(x, leak, *dynamics)  # type: ignore[arg-type]
    backend = current_lif_backend()
    if backend == "spikingjelly":
        if x.numel() > 0 and not is_watched(x):
            return spikingjelly_integrate_and_fire(x, leak, dynamics)
        backend = TRACED
    return _IntegrateAndFire.apply(x, leak, dynamics, backend)
