"""What a deployed neuron consists of."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..layers import IF, LIF, ParametricLIF, integrate_and_fire
from ..layers.recurrence import membrane_dtype

__all__ = ["NeuronSpec"]


class NeuronSpec(NamedTuple):
    """A layer's neurons without what only training needs, see `layers.dynamics`."""

    leak: float
    threshold: float
    soft_reset: bool
    decay_input: bool

    @classmethod
    def of(cls, neuron: nn.Module, name: str) -> "NeuronSpec | None":
        """From a neuron layer; None for `nn.Identity`, which stands for no neuron.

        Raises:
            TypeError: For another layer.
        """
        if type(neuron) is nn.Identity:
            return None
        if type(neuron) is LIF:
            leak = neuron.leak
        elif type(neuron) is IF:
            leak = 0.0
        elif type(neuron) is ParametricLIF:
            leak = torch.sigmoid(neuron.w.detach().to(membrane_dtype(neuron.w))).item()
        else:
            raise TypeError(
                f"{name} is a {type(neuron).__name__}, of which no deployed form is known: neurons must be LIF, IF or "
                "ParametricLIF"
            )
        return cls(leak, neuron.threshold, neuron.soft_reset, neuron.decay_input)

    def fire(self, currents: Tensor) -> Tensor:
        """Input currents [T, ...] to spikes of the same shape and dtype, as `set_lif_backend` says."""
        return integrate_and_fire(currents, self.leak, self.threshold, self.soft_reset, self.decay_input)
