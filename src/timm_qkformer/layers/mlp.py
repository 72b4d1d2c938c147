"""Spiking MLP: QKFormer (arXiv 2403.16552), eq. 4 to 6, and eq. 17 with membrane shortcuts."""

from typing import Any

from torch import Tensor, nn

from .conv import SpikingConv
from .drop import TimeDropout
from .neurons import LIF, NeuronLayer

__all__ = ["SpikingMlp"]


class SpikingMlp(nn.Module):
    """LIF BN fc2 LIF BN fc1, both 1x1 convolutions with bias: [T, B, C, H, W] to spikes of the same shape.

    Args:
        dim: Channels of input and output.
        hidden_dim: Channels in between.
        drop: Dropout after the second layer, one mask for all time steps.
        neuron_layer: Factory of the neurons.
        membrane_shortcut: Leave out the last neuron and return its input currents, which a membrane shortcut adds up.
    """

    def __init__(
        self,
        dim: int,
        hidden_dim: int,
        drop: float = 0.0,
        neuron_layer: NeuronLayer = LIF,
        membrane_shortcut: bool = False,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        last_layer = nn.Identity if membrane_shortcut else neuron_layer
        self.fc1 = SpikingConv(dim, hidden_dim, bias=True, neuron_layer=neuron_layer, **dd)
        self.fc2 = SpikingConv(hidden_dim, dim, bias=True, neuron_layer=last_layer, **dd)
        self.drop = TimeDropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.fc2(self.fc1(x)))
