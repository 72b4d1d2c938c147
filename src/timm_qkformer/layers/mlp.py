"""Spiking MLP: QKFormer (arXiv 2403.16552), eq. 4 to 6, and eq. 17 with membrane shortcuts."""

from typing import Any

from torch import Tensor, nn

from ..execution.packing import BINARY, Range
from ..neurons import LIF, NeuronLayer
from .conv import SpikingConv
from .drop import TimeDropout


class SpikingMlp(nn.Module):
    """LIF BN fc2 LIF BN fc1, both 1x1 convolutions with bias: [T, B, C, H, W] to spikes of the same shape.

    Args:
        dim: Channels of input and output.
        hidden_dim: Channels in between.
        drop: Dropout after the second layer, one mask for all time steps.
        neuron_layer: Factory of the neurons.
        membrane_shortcut: Leave out the last neuron and return its input currents, which a membrane shortcut adds up.
        input_range: What the input may hold.
    """

    def __init__(
        self,
        dim: int,
        hidden_dim: int,
        drop: float = 0.0,
        neuron_layer: NeuronLayer = LIF,
        membrane_shortcut: bool = False,
        input_range: Range = BINARY,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        last_layer = nn.Identity if membrane_shortcut else neuron_layer
        self.fc1 = SpikingConv(dim, hidden_dim, bias=True, input_range=input_range, neuron_layer=neuron_layer, **dd)
        spikes = self.fc1.output_range
        self.fc2 = SpikingConv(hidden_dim, dim, bias=True, input_range=spikes, neuron_layer=last_layer, **dd)
        self.drop = TimeDropout(drop)
        self.output_range = self.fc2.output_range.dropped(drop > 0)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.fc2(self.fc1(x)))
