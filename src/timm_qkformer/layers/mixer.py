"""Depth-wise convolution in place of attention: Max-Former (arXiv 2505.18608), section 4.

Spiking neurons are low-pass filters; early in the network a small depth-wise convolution lets high frequencies
through that attention would average away, and costs less.
"""

from typing import Any

from torch import Tensor, nn

from .conv import SpikingConv
from .drop import TimeDropout
from .neurons import LIF, NeuronLayer

__all__ = ["SpikingDepthwiseConv"]


class SpikingDepthwiseConv(nn.Module):
    """LIF(BN(depth-wise conv)): [T, B, C, H, W] to spikes of the same shape.

    Args:
        dim: Channels of the stage.
        kernel_size: Side of the kernel, odd.
        proj_drop: Dropout at the end, one mask for all time steps.
        neuron_layer: Factory of the neurons.
        membrane_shortcut: Leave out the neuron and return its input currents, which a membrane shortcut adds up.

    Raises:
        ValueError: For an even kernel, which would change the size.
    """

    def __init__(
        self,
        dim: int,
        kernel_size: int = 7,
        proj_drop: float = 0.0,
        neuron_layer: NeuronLayer = LIF,
        membrane_shortcut: bool = False,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"kernel_size={kernel_size} must be odd, so that the size stays the same")
        last_layer = nn.Identity if membrane_shortcut else neuron_layer
        self.dw = SpikingConv(
            dim, dim, kernel_size, bias=True, groups=dim, neuron_layer=last_layer, device=device, dtype=dtype
        )
        self.proj_drop = TimeDropout(proj_drop)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj_drop(self.dw(x))
