"""The recurrence of `spec`, one time step after the other, forwards and backwards, in differentiable torch operations.

What these functions say once, every path runs: eager mode, a graph that somebody else traces and compiles, and the
compiled kernels. Equations and symbols are those of `spec`.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple, Optional

import torch
from torch import Tensor

from .spec import NeuronSpec, membrane_dtype


def integrate_and_fire_reference(
    x: Tensor,
    leak: Tensor,
    threshold: float = 1.0,
    soft_reset: bool = False,
    decay_input: bool = True,
    levels: str = "binary",
    detach_reset: bool = True,
    surrogate: str = "sigmoid",
    alpha: float = 4.0,
    max_spikes: int = 1,
    v: Optional[Tensor] = None,
) -> tuple[Tensor, Tensor]:
    """The equations, one step after the other, differentiated by autograd: the yardstick for every faster path.

    Args:
        x: Input currents [T, ...].
        leak, threshold, soft_reset, decay_input, levels, detach_reset, surrogate, alpha, max_spikes: See `NeuronSpec`.
        v: Membrane potential [...] before the first step; None at rest.

    Returns:
        Spikes of the shape and dtype of x, and the potential after the last step (empty for real levels).
    """
    if levels == "real":
        return torch.relu(x), x.new_empty(0)
    dtype = membrane_dtype(x)
    potential: Optional[Tensor] = None if v is None else v.to(dtype)
    spikes: list[Tensor] = []
    for x_t in x.to(dtype).unbind(0):
        if potential is None:  # at rest: what `charge` gives for 0. Zeros would fix the size in a trace.
            h = x_t * leak if decay_input else x_t
        else:
            h = charge(potential, x_t, leak, decay_input)
        first, more = firing_thresholds(threshold, levels, max_spikes)
        up = _step_function(h - first, surrogate, alpha)
        s, fired = up, up
        if levels == "ternary":
            down = _step_function(-h - threshold, surrogate, alpha)
            s, fired = up - down, up + down
        for higher in more:
            s = s + _step_function(h - higher, surrogate, alpha)
        if soft_reset:
            potential = h - threshold * (s.detach() if detach_reset else s)
        else:
            potential = (1.0 - (fired.detach() if detach_reset else fired)) * h
        spikes.append(s.to(x.dtype))
    assert potential is not None
    return torch.stack(spikes), potential


def firing_thresholds(threshold: float, levels: str, max_spikes: int) -> tuple[float, list[float]]:
    """Potential from which a neuron fires, and those of its further spikes: integer levels round it."""
    if levels == "integer":
        return 0.5 * threshold, [(k - 0.5) * threshold for k in range(2, max_spikes + 1)]
    return threshold, []


def _step_function(u: Tensor, surrogate: str, alpha: float) -> Tensor:
    """Value: 1 where u >= 0, else 0, exactly. Gradient: the surrogate's."""
    primitive = surrogate_primitive(u, surrogate, alpha)
    return (u >= 0).to(u.dtype) + (primitive - primitive.detach())


def surrogate_primitive(u: Tensor, surrogate: str, alpha: float) -> Tensor:
    """p(u): its derivative under autograd is the surrogate gradient."""
    if surrogate == "sigmoid":
        return torch.sigmoid(alpha * u)
    if surrogate == "box":
        return torch.clamp(alpha * u + 0.5, 0.0, 1.0)
    return torch.atan(math.pi / 2 * alpha * u) / math.pi + 0.5


def surrogate_derivative(u: Tensor, surrogate: str, alpha: float | Tensor) -> Tensor:
    """p'(u), written out."""
    if surrogate == "sigmoid":
        p = torch.sigmoid(alpha * u)
        return alpha * p * (1.0 - p)
    if surrogate == "box":
        return ((alpha * u).abs() <= 0.5).to(u.dtype) * alpha
    return alpha / 2 / (1.0 + (math.pi / 2 * alpha * u).square())


def _through_surrogate(grad: Tensor, u: Tensor, surrogate: str, alpha: float | Tensor) -> Tensor:
    """grad p'(u), in as few passes over memory as torch's operations allow."""
    if surrogate == "sigmoid":
        gradient: Tensor = torch.ops.aten.sigmoid_backward(grad, torch.sigmoid(alpha * u))
        return gradient * alpha
    return grad * surrogate_derivative(u, surrogate, alpha)


class Affine(NamedTuple):
    """What a batch norm does to each channel: x * scale + shift, both [C] in the membrane's precision."""

    scale: Tensor
    shift: Tensor


def scale_and_shift(steps: Sequence[Tensor], affine: Affine) -> list[Tensor]:
    """Steps [..., C] to the input currents that their batch norm makes of them, in the membrane's precision."""
    return [x.to(affine.scale.dtype) * affine.scale + affine.shift for x in steps]


def charge(v: Tensor, x: Tensor, leak: Tensor, decay_input: bool) -> Tensor:
    """H[t] from V[t-1] and X[t]."""
    if decay_input:
        return v + (x - v) * leak
    return v - v * leak + x


def _charge_from(v: Tensor | None, x: Tensor, spec: NeuronSpec) -> Tensor:
    if v is None:  # at rest: what `charge` gives for v = 0
        return x * spec.leak if spec.decay_input else x
    if spec.decay_input and not torch.is_grad_enabled():  # the same numbers, in one new tensor instead of three
        return (x - v).mul_(spec.leak).add_(v)
    return charge(v, x, spec.leak, spec.decay_input)


def _fire(h: Tensor, spec: NeuronSpec) -> tuple[Tensor, Tensor]:
    """S[t], as bool for binary neurons, and whether the neuron fired."""
    first, more = firing_thresholds(spec.threshold, spec.levels, spec.max_spikes)
    up = h >= first
    if spec.levels == "binary":
        return up, up
    if spec.levels == "integer":
        spikes = up.to(h.dtype)
        for higher in more:
            spikes = spikes + (h >= higher).to(h.dtype)
        return spikes, up
    down = h <= -spec.threshold
    return up.to(h.dtype) - down.to(h.dtype), up | down


def _reset(h: Tensor, spikes: Tensor, fired: Tensor, spec: NeuronSpec) -> Tensor:
    return h - spec.threshold * spikes.to(h.dtype) if spec.soft_reset else h.masked_fill(fired, 0.0)


def fire_steps(
    currents: Sequence[Tensor], spec: NeuronSpec, v: Tensor | None = None, keep_state: bool = False
) -> tuple[list[Tensor], Tensor | None]:
    """Input currents X[t] to spikes S[t], bool for binary neurons, and with `keep_state` the potential after them.

    `v`: The potential before them, None at rest.
    """
    dtype = membrane_dtype(currents[0])
    all_spikes: list[Tensor] = []
    for t, x in enumerate(currents):
        h = _charge_from(v, x.to(dtype), spec)
        spikes, fired = _fire(h, spec)
        if keep_state or t < len(currents) - 1:
            v = _reset(h, spikes, fired, spec)
        all_spikes.append(spikes)
    return all_spikes, v if keep_state else None


class Gradients(NamedTuple):
    """Gradients of a layer's neurons, in the membrane's precision."""

    currents: list[Tensor]  # dL/dX[t]
    leak: Tensor | None  # each neuron's share of dL/dleak, if asked for
    v: Tensor  # dL/dV[0]


def gradient_steps(
    grad_spikes: Sequence[Tensor],
    currents: Sequence[Tensor],
    spec: NeuronSpec,
    leak_gradient: bool,
    v: Tensor | None = None,
    grad_v: Tensor | None = None,
) -> Gradients:
    """dL/dX[t] from dL/dS[t] and, if the potential after the last step was used, dL/dV[T] (`grad_v`).

    The potentials are computed again from the input currents and the potential before them (`v`, None at rest).
    """
    dtype = membrane_dtype(currents[0])
    threshold = spec.threshold
    first, more = firing_thresholds(threshold, spec.levels, spec.max_spikes)
    before: list[Tensor | None] = []  # V[t-1], None at rest
    charged: list[Tensor] = []  # H[t]
    all_fired: list[Tensor] = []
    for x in currents:
        before.append(v)
        charged.append(_charge_from(v, x.to(dtype), spec))
        spikes, fired = _fire(charged[-1], spec)
        all_fired.append(fired)
        v = _reset(charged[-1], spikes, fired, spec)

    grad_currents: list[Tensor] = []
    grad_leak: Tensor | None = None
    for t in reversed(range(len(currents))):
        h, v = charged[t], before[t]
        grad_spike = grad_spikes[t].to(dtype)
        if spec.levels == "binary" and spec.detach_reset:
            grad_h = _through_surrogate(grad_spike, h - threshold, spec.surrogate, spec.alpha)
        else:
            up = surrogate_derivative(h - first, spec.surrogate, spec.alpha)
            ds_dh = dfired_dh = up
            if spec.levels == "ternary":
                down = surrogate_derivative(h + threshold, spec.surrogate, spec.alpha)  # p' is even
                ds_dh, dfired_dh = up + down, up - down
            for higher in more:
                ds_dh = ds_dh + surrogate_derivative(h - higher, spec.surrogate, spec.alpha)
            grad_h = grad_spike * ds_dh
        if grad_v is not None:
            grad_h = grad_h + (grad_v if spec.soft_reset else grad_v.masked_fill(all_fired[t], 0.0))
            if not spec.detach_reset:
                grad_h = grad_h - grad_v * (threshold * ds_dh if spec.soft_reset else h * dfired_dh)
        leaked = grad_h * spec.leak
        grad_v = grad_h - leaked
        grad_currents.append(leaked if spec.decay_input else grad_h)
        if leak_gradient:
            drive = currents[t].to(dtype) if spec.decay_input else torch.zeros_like(h)
            share = grad_h * (drive if v is None else drive - v)
            grad_leak = share if grad_leak is None else grad_leak + share
    assert grad_v is not None
    return Gradients(grad_currents[::-1], grad_leak, grad_v)
