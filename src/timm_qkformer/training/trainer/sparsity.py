"""A penalty on operations: spikes above a firing rate cost.

Each spike is an addition for every weight that it meets, so a network that fires less is one that takes less energy.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ...neurons import SpikingNeuron
from .settings import Settings


class FiringRatePenalty:
    """weight * max(0, rate - target), with the rate of a training batch, as `firing_rates` reports it: spikes of all
    neurons over their number, the time steps and the spikes that each may fire in one. Gradients go through the
    neurons' surrogate.

    Args:
        model: Its neurons are hooked, which has them run as modules, not fused with the layers around them.
        weight, target: As above.

    Raises:
        ValueError: For a model without neurons that spike.
    """

    def __init__(self, model: nn.Module, weight: float, target: float) -> None:
        self.weight = weight
        self.target = target
        self._seen: list[tuple[Tensor, int]] = []
        neurons = [m for m in model.modules() if isinstance(m, SpikingNeuron) and m.levels != "real"]
        if not neurons:
            raise ValueError(f"firing_rate_penalty={weight}: {type(model).__name__} has no neurons that spike")
        for neuron in neurons:
            neuron.register_forward_hook(self._count)

    def __deepcopy__(self, memo: dict[int, Any]) -> "FiringRatePenalty":
        return self  # a moving average of the weights is a copy of the model, hooks included, and never trains

    def _count(self, module: nn.Module, args: Any, spikes: Tensor) -> Tensor:
        if module.training and torch.is_grad_enabled():
            spikes, fired = _Counted.apply(spikes, module.levels == "ternary")
            self._seen.append((fired / module.max_spikes, spikes.numel()))
        return spikes

    def take(self) -> Tensor:
        """The penalty of what the model did since the last time."""
        if not self._seen:  # all neurons are frozen
            return torch.zeros(())
        fired, neurons = zip(*self._seen, strict=True)
        self._seen.clear()
        return self.weight * torch.relu(torch.stack(fired).sum() / sum(neurons) - self.target)


class _Counted(torch.autograd.Function):
    """Spikes as they are, and how many. Autograd's own gradient of a sum takes three more passes over all of them."""

    @staticmethod
    def forward(ctx: Any, spikes: Tensor, ternary: bool) -> tuple[Tensor, Tensor]:
        ctx.ternary = ternary
        if ternary:
            ctx.save_for_backward(spikes)
        return spikes.view_as(spikes), (spikes.abs() if ternary else spikes).sum(dtype=torch.float32)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_spikes: Tensor, grad_fired: Tensor) -> tuple[Tensor, None]:
        if ctx.ternary:
            (spikes,) = ctx.saved_tensors
            return torch.addcmul(grad_spikes, spikes.sign(), grad_fired.to(spikes.dtype)), None
        return grad_spikes + grad_fired, None  # silent neurons are kept from firing, too


def firing_rate_penalty(settings: Settings, model: nn.Module) -> FiringRatePenalty | None:
    """The penalty that the settings ask for, if they do (ValueError where it cannot be)."""
    if not settings.firing_rate_penalty:
        return None
    return FiringRatePenalty(model, settings.firing_rate_penalty, settings.firing_rate_target)
