"""The recurrence of `dynamics`, one time step after the other, forwards and backwards, in differentiable torch ops.

What these functions say once, every path runs: eager mode, a graph that somebody else traces and compiles, and the
fused kernels. Equations and symbols stand in `dynamics`.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .surrogate import surrogate_derivative

__all__ = [
    "Affine",
    "Dynamics",
    "charge",
    "fire_steps",
    "gradient_steps",
    "membrane_dtype",
    "reset",
    "scale_and_shift",
]


class Dynamics(NamedTuple):
    """What a layer of neurons is told besides its input current and leak, see `dynamics.integrate_and_fire`."""

    threshold: float | Tensor
    soft_reset: bool
    decay_input: bool
    detach_reset: bool
    surrogate: str
    alpha: float | Tensor


class Affine(NamedTuple):
    """What a batch norm does to each channel: x * scale + shift, both [C] in the membrane's precision."""

    scale: Tensor
    shift: Tensor


def scale_and_shift(steps: Sequence[Tensor], affine: Affine) -> list[Tensor]:
    """Steps [..., C] to the input currents that their batch norm makes of them, in the membrane's precision."""
    return [x.to(affine.scale.dtype) * affine.scale + affine.shift for x in steps]


def membrane_dtype(x: Tensor) -> torch.dtype:
    """Precision of potentials and of spike counts for spikes of x's dtype: never below float32."""
    if x.dtype == torch.float16 or x.dtype == torch.bfloat16:
        return torch.float32
    return x.dtype


def charge(v: Tensor, x: Tensor, leak: Tensor, decay_input: bool) -> Tensor:
    """H[t] from V[t-1] and X[t]."""
    if decay_input:
        return v + (x - v) * leak
    return v - v * leak + x


def reset(h: Tensor, fired: Tensor, threshold: float | Tensor, soft: bool) -> Tensor:
    """V[t] from H[t] and whether the neuron fired (bool)."""
    return h - threshold * fired.to(h.dtype) if soft else h.masked_fill(fired, 0.0)


def _charge_from(v: Tensor | None, x: Tensor, leak: float | Tensor, decay_input: bool) -> Tensor:
    if v is None:  # at rest: what `charge` gives for v = 0
        return x * leak if decay_input else x
    return charge(v, x, leak, decay_input)  # type: ignore[arg-type]


def fire_steps(currents: Sequence[Tensor], leak: float | Tensor, dynamics: Dynamics) -> list[Tensor]:
    """Input currents X[t] to spikes S[t], as bool, starting from rest."""
    dtype = membrane_dtype(currents[0])
    spikes: list[Tensor] = []
    v: Tensor | None = None
    for x in currents:
        if v is not None:
            v = reset(v, spikes[-1], dynamics.threshold, dynamics.soft_reset)
        v = _charge_from(v, x.to(dtype), leak, dynamics.decay_input)
        spikes.append(v >= dynamics.threshold)
    return spikes


def gradient_steps(
    grad_spikes: Sequence[Tensor],
    currents: Sequence[Tensor],
    leak: float | Tensor,
    dynamics: Dynamics,
    leak_gradient: bool,
) -> tuple[list[Tensor], Tensor | None]:
    """dL/dX[t] from dL/dS[t], and each neuron's share of dL/dleak where `leak_gradient` asks for it.

    The potentials are computed again from the input currents. Results have the membrane's precision.
    """
    threshold, soft_reset, decay_input, detach_reset, surrogate, alpha = dynamics
    dtype = membrane_dtype(currents[0])
    before: list[Tensor | None] = []  # V[t-1], None at rest
    charged: list[Tensor] = []  # H[t]
    fired: list[Tensor] = []  # S[t]
    for x in currents:
        before.append(reset(charged[-1], fired[-1], threshold, soft_reset) if charged else None)
        charged.append(_charge_from(before[-1], x.to(dtype), leak, decay_input))
        fired.append(charged[-1] >= threshold)

    grad_currents: list[Tensor] = []
    grad_leak: Tensor | None = None
    grad_v: Tensor | None = None  # dL/dV[t]
    for t in reversed(range(len(currents))):
        h, v = charged[t], before[t]
        ds_dh = surrogate_derivative(h - threshold, surrogate, alpha)
        grad_h = grad_spikes[t].to(dtype) * ds_dh
        if grad_v is not None:
            grad_h = grad_h + (grad_v if soft_reset else grad_v.masked_fill(fired[t], 0.0))
            if not detach_reset:
                grad_h = grad_h - grad_v * ((threshold if soft_reset else h) * ds_dh)
        leaked = grad_h * leak
        grad_v = grad_h - leaked
        grad_currents.append(leaked if decay_input else grad_h)
        if leak_gradient:
            drive = currents[t].to(dtype) if decay_input else torch.zeros_like(h)
            share = grad_h * (drive if v is None else drive - v)
            grad_leak = share if grad_leak is None else grad_leak + share
    return grad_currents[::-1], grad_leak
