"""From sequences [T, B, C, H, W] to feature maps [B, C, H, W], which is where timm's interface begins."""

from typing import Any

from timm.layers import register_notrace_module
from torch import Tensor, nn

from .neurons import LIF, NeuronLayer
from .recurrence import membrane_dtype

__all__ = ["MeanReadout", "MembraneReadout"]


class MeanReadout(nn.Module):
    """Mean over T: for spikes or sums of spikes, the firing-rate map."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(0)


@register_notrace_module
class MembraneReadout(nn.Module):
    """Readout of membrane potentials through neurons, one per channel, that see their mean over space.

    A model with membrane shortcuts ends with: mean over space, LIF per step, Linear, mean over T. The last two
    commute, so what the classifier needs is each neuron's firing rate,

        rate = mean over T of LIF(mean over space of X[t])        [B, C]

    and the map returned is the mean of X over T, shifted in each sample and channel so that its mean over space is
    that rate. Average pooling of the map gives the rate, and classifying it gives the model's own logits. Other
    pooling is taken relative to it: the maximum, for one, is rate + (max - mean over space) of the mean potential.

    Args:
        neuron_layer: Factory of the neurons.
    """

    def __init__(self, neuron_layer: NeuronLayer = LIF, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        self.neuron = neuron_layer(device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Membrane potentials [T, B, C, H, W] to the shifted map [B, C, H, W]."""
        dtype = membrane_dtype(x)
        rate = self.neuron(x.mean((3, 4), keepdim=True, dtype=dtype)).mean(0)
        mean = x.mean(0, dtype=dtype)
        return (mean + (rate - mean.mean((2, 3), keepdim=True))).to(x.dtype)
