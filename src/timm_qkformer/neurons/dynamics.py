"""Running a layer of neurons over a sequence: pure functions of the input current and the potential before it.

A sequence [T, ...] of input currents goes in, a sequence of spikes of the same shape comes out. Nothing is kept between
calls: `run_neurons` takes the membrane potential as an argument and returns it, `integrate_and_fire` starts from rest.
Both give the spikes and gradients of `integrate_and_fire_reference` and keep nothing for the backward pass but their
input, on the backend that the execution policy chose.
"""

from typing import Any

import torch
from torch import Tensor

from ..execution.policy import current_policy, under_dispatch_mode
from .compiled import compiled_gradients, compiled_spikes, like_steps
from .recurrence import fire_steps, gradient_steps, integrate_and_fire_reference
from .spec import NeuronSpec
from .spikingjelly import spikingjelly_integrate_and_fire
from .state import carried_state

TRACED = "traced"  # not a backend to choose: the operations themselves, for somebody else's graph


def integrate_and_fire(x: Tensor, spec: NeuronSpec) -> Tensor:
    """Run a layer of neurons over a whole sequence, starting from rest.

    Args:
        x: Input currents [T, ...], floating point, T >= 1.
        spec: The neurons. A leak that is a tensor gets a gradient.

    Returns:
        Spikes of the shape and dtype of x. The steps lie one behind the other; each is laid out as those of x if these
        are dense (contiguous, channels last, ...) and contiguous otherwise.
    """
    return _run(x, spec, None, keep_state=False)[0]


def run_neurons(x: Tensor, spec: NeuronSpec, v: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Run a layer of neurons from the potential `v`, so that T steps one at a time equal one call with all T.

    Args:
        x: Input currents [T, ...], floating point, T >= 1.
        spec: The neurons.
        v: Membrane potential [...] before the first step, measured from rest; None at rest.

    Returns:
        Spikes of the shape and dtype of x, and the potential after the last step, in float32 at least. Neurons of real
        levels have none: an empty tensor.

    Raises:
        ValueError: For a potential of another shape or device than a step of x.
    """
    checked = v is not None and spec.levels != "real" and not torch.jit.is_tracing()  # a trace cannot hold the check
    if checked and v is not None and (v.shape != x.shape[1:] or v.device != x.device):
        raise ValueError(
            f"potential v of shape {list(v.shape)} on {v.device} does not belong to input currents of shape "
            f"{list(x.shape)} on {x.device}: it must be {list(x.shape[1:])}, one value for each neuron"
        )
    spikes, potential = _run(x, spec, v, keep_state=True)
    assert potential is not None
    return spikes, potential


def fire_neurons(x: Tensor, spec: NeuronSpec) -> Tensor:
    """`integrate_and_fire`, or on from the state that `run_with_state` carries here and now."""
    carried = carried_state()
    if carried is None or spec.levels == "real":
        return integrate_and_fire(x, spec)
    spikes, v = run_neurons(x, spec, carried.take())
    carried.put(v)
    return spikes


def _run(x: Tensor, spec: NeuronSpec, v: Tensor | None, keep_state: bool) -> tuple[Tensor, Tensor | None]:
    if spec.levels == "real":
        return torch.relu(x), x.new_empty(0)
    # What torch.jit traces can be saved only if autograd, and no function of ours, differentiates it; torch.func
    # differentiates and batches what autograd can.
    if torch.jit.is_tracing() or torch._C._are_functorch_transforms_active():
        return integrate_and_fire_reference(x, *spec, v=v)
    if torch.compiler.is_compiling():
        return _apply(x, spec, v, TRACED, keep_state)
    backend = current_policy().neurons
    if backend == "spikingjelly":
        if x.numel() > 0 and not under_dispatch_mode(x):
            return spikingjelly_integrate_and_fire(x, spec, v)
        backend = TRACED
    return _apply(x, spec, v, backend, keep_state)


def _apply(
    x: Tensor, spec: NeuronSpec, v: Tensor | None, backend: str, keep_state: bool
) -> tuple[Tensor, Tensor | None]:
    result = _IntegrateAndFire.apply(x, spec.leak, v, spec, backend, keep_state)
    return result if keep_state else (result, None)


class _IntegrateAndFire(torch.autograd.Function):
    """Spikes of the reference; its gradient written out, with the potentials computed again from the input."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        leak: Tensor | float,
        v: Tensor | None,
        spec: NeuronSpec,
        backend: str,
        keep_state: bool,
    ) -> Tensor | tuple[Tensor, Tensor]:
        tensors = {"x": x, "v": v, "leak": leak if isinstance(leak, Tensor) else None}
        ctx.saved = [name for name, tensor in tensors.items() if tensor is not None]
        ctx.save_for_backward(*(tensor for tensor in tensors.values() if tensor is not None))
        ctx.spec = spec._replace(leak=None) if isinstance(leak, Tensor) else spec
        ctx.backend, ctx.keep_state = backend, keep_state
        potential: Tensor | None
        if backend == TRACED:
            steps, potential = fire_steps(x.unbind(0), spec, v, keep_state)
            spikes = _join([fired.to(x.dtype) for fired in steps])
        else:
            compiled = compiled_spikes(x, spec, backend, v=v, keep_state=keep_state)
            if compiled is not None:
                spikes, potential = compiled.spikes, compiled.potential
            else:
                spikes = like_steps(x)
                steps, potential = fire_steps(x.unbind(0), spec, v, keep_state)
                for t, fired in enumerate(steps):
                    spikes[t] = fired
        if not keep_state:
            return spikes
        assert potential is not None
        return spikes, potential

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        # Read once: activation checkpointing computes saved tensors again for every access.
        saved = dict(zip(ctx.saved, ctx.saved_tensors, strict=True))
        x, v = saved["x"], saved.get("v")
        spec: NeuronSpec = ctx.spec._replace(leak=saved["leak"]) if "leak" in saved else ctx.spec
        grad_spikes, grad_v = grad_outputs if ctx.keep_state else (grad_outputs[0], None)
        leak_gradient = ctx.needs_input_grad[1]
        if ctx.backend != TRACED and torch.is_grad_enabled() and not spec.detach_reset:
            # To be differentiated once more, through the surrogate in the reset, too, which autograd alone knows of.
            results = integrate_and_fire_reference(x, *spec, v=v)
            names = zip(("x", "leak", "v"), ctx.needs_input_grad, strict=False)
            needed = [saved[name] for name, need in names if need]
            outer = (grad_spikes, torch.zeros_like(results[1]) if grad_v is None else grad_v)
            found = iter(torch.autograd.grad(results, needed, outer, create_graph=True, allow_unused=True))
            return *(next(found) if need else None for need in ctx.needs_input_grad[:3]), None, None, None
        if ctx.backend != TRACED and not torch.is_grad_enabled():  # enabled: to be differentiated once more
            compiled = compiled_gradients(grad_spikes, x, spec, leak_gradient, ctx.backend, v=v, grad_v=grad_v)
            if compiled is not None:
                grad_x, grad_leak, grad_v = compiled
                return grad_x, grad_leak, grad_v if v is not None else None, None, None, None
        grads = gradient_steps(grad_spikes.unbind(0), x.unbind(0), spec, leak_gradient, v, grad_v)
        grad_leak = grads.leak.sum() if grads.leak is not None else None
        grad_x = _join([grad.to(x.dtype) for grad in grads.currents])
        return grad_x, grad_leak, None if v is None else grads.v.to(v.dtype), None, None, None


def _join(steps: list[Tensor]) -> Tensor:
    """Steps [B, ...] to [T, B, ...]. Unlike `torch.stack`, `cat` keeps channels-last memory."""
    if steps[0].dim() == 0:
        return torch.stack(steps)
    return torch.cat(steps).unflatten(0, [len(steps), steps[0].shape[0]])
