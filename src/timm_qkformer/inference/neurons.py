"""Neurons of deployed models, and modules that keep what they computed from their buffers."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..neurons import NeuronSpec, SpikingNeuron, fire_neurons


class DerivedState(nn.Module):
    """Keeps values in `self.derived` until the buffers are moved, converted or loaded; neither copied nor saved."""

    def __init__(self) -> None:
        super().__init__()
        self.derived: dict[Any, Any] = {}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "DerivedState":
        self.derived = {}
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.derived = {}
        super()._load_from_state_dict(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "derived": {}}


class DeployedNeuron(DerivedState):
    """Holds a `NeuronSpec`. The leak, which parametric LIF neurons learn, is saved with the model.

    Args:
        neuron: What it stands for.
        name: What to call it in errors.

    Raises:
        TypeError: For another layer than neurons of this package, or some with a `forward` of their own.
    """

    leak: Tensor

    def __init__(self, neuron: nn.Module, name: str) -> None:
        super().__init__()
        if not isinstance(neuron, SpikingNeuron) or type(neuron).forward is not SpikingNeuron.forward:
            raise TypeError(
                f"{name} is a {type(neuron).__name__}, of which no deployed form is known: neurons must be LIF, IF, "
                "ParametricLIF or others that derive from SpikingNeuron and keep its forward"
            )
        learned = next(neuron.parameters(), None)
        spec = neuron.spec(torch.float32 if learned is None else torch.promote_types(learned.dtype, torch.float32))
        leak = spec.leak.item() if isinstance(spec.leak, Tensor) else spec.leak
        self.register_buffer("leak", torch.tensor(leak, dtype=torch.float64))
        self.fixed = spec._replace(leak=0.0)

    @classmethod
    def of(cls, neuron: nn.Module, name: str) -> "DeployedNeuron | None":
        """None for `nn.Identity`, which stands for no neuron."""
        return None if type(neuron) is nn.Identity else cls(neuron, name)

    @property
    def spec(self) -> NeuronSpec:
        spec: NeuronSpec | None = self.derived.get("spec")
        if spec is None:  # read once: on a GPU, reading waits for all that is under way
            spec = self.derived["spec"] = self.fixed._replace(leak=self.leak.item())
        return spec

    def forward(self, x: Tensor) -> Tensor:
        """Input currents [T, ...] to spikes of the same shape and dtype."""
        return fire_neurons(x, self.spec)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value}" for name, value in self.spec._asdict().items())
