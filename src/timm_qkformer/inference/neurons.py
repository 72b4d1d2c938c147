"""Neurons of deployed models: without what only training needs."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..layers import IF, LIF, ParametricLIF, integrate_and_fire
from ..layers.recurrence import membrane_dtype
from .derived import DerivedState

__all__ = ["DeployedNeuron", "NeuronSpec"]


class NeuronSpec(NamedTuple):
    """What the dynamics of a layer's neurons depend on, see `layers.dynamics`."""

    leak: float
    threshold: float
    soft_reset: bool
    decay_input: bool

    def fire(self, currents: Tensor) -> Tensor:
        """Input currents [T, ...] to spikes of the same shape and dtype, as `set_lif_backend` says."""
        return integrate_and_fire(currents, self.leak, self.threshold, self.soft_reset, self.decay_input)


class DeployedNeuron(DerivedState):
    """Holds a `NeuronSpec`. The leak, which parametric LIF neurons learn, is saved with the model.

    Args:
        neuron: What it stands for.
        name: What to call it in errors.

    Raises:
        TypeError: For another layer than IF, LIF and ParametricLIF.
    """

    leak: Tensor

    def __init__(self, neuron: nn.Module, name: str) -> None:
        super().__init__()
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
        self.register_buffer("leak", torch.tensor(leak, dtype=torch.float64))
        self.fixed = (neuron.threshold, neuron.soft_reset, neuron.decay_input)

    @classmethod
    def of(cls, neuron: nn.Module, name: str) -> "DeployedNeuron | None":
        """None for `nn.Identity`, which stands for no neuron."""
        return None if type(neuron) is nn.Identity else cls(neuron, name)

    @property
    def spec(self) -> NeuronSpec:
        spec: NeuronSpec | None = self.derived.get("spec")
        if spec is None:  # read once: on a GPU, reading waits for all that is under way
            spec = self.derived["spec"] = NeuronSpec(self.leak.item(), *self.fixed)
        return spec

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value}" for name, value in self.spec._asdict().items())
