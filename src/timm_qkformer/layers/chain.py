"""From pixels to tokens at one resolution: the chains of convolutions that flat spiking transformers begin with.

Spikformer (arXiv 2209.15425), section 3.2, and Spike-driven Transformer (arXiv 2307.01694), section 3.2, pool spikes;
CML (arXiv 2305.05889) pools before the neurons. Spikingformer (arXiv 2304.11954), section 3.3, counts its units from
the neurons on, which makes the same chains.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from ..execution.packing import BINARY, Range
from ..neurons import LIF, NeuronLayer
from .conv import SpikingConv, output_range


class UnitSpec(NamedTuple):
    """A 3x3 convolution with batch norm: its channels, where it halves the size by pooling, whether neurons end it.

    `pool` is "" for nowhere, "currents" before the neurons, "spikes" after them. The convolution may have a `stride`.
    """

    dim: int
    pool: str = ""
    fires: bool = True
    stride: int = 1

    @property
    def reduction(self) -> int:
        """How many pixels of the input a pixel of the output stands for, along each side."""
        return 2 * self.stride if self.pool else self.stride


class PositionSpec(NamedTuple):
    """A convolution that is added to the tokens and tells them where they are: with neurons before it, after it."""

    fires_before: bool = False
    fires: bool = True


class SpikingChain(nn.Module):
    """y = F(x), or y + P(y) with a position unit: [T, B, C, H, W] to spikes, spike sums or currents [T, B, C', H', W'].

    F is a chain of 3x3 convolutions, each BN(conv x), neurons and pooling as its spec says. P is one more:

        LIF(BN(conv y))     on spikes (Spikformer)
        BN(conv LIF(y))     on currents (Spike-driven Transformer)
        BN(conv y)          on currents (AutoST)

    Args:
        in_chs: Channels of the input.
        units: The convolutions of F.
        position: P, or None for none.
        fires_before: Begin with neurons, for input that is membrane potentials.
        neuron_layer: Factory of the neurons.
        input_range: What the input may hold.

    Raises:
        ValueError: For no convolution, or a pooling that there is not.
    """

    def __init__(
        self,
        in_chs: int,
        units: Sequence[UnitSpec],
        position: PositionSpec | None = None,
        fires_before: bool = False,
        neuron_layer: NeuronLayer = LIF,
        input_range: Range = BINARY,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        if len(units) == 0:
            raise ValueError("units=() is empty: give at least one convolution")
        dd = {"device": device, "dtype": dtype}

        def unit(chs: int, spec: UnitSpec, numbers: Range) -> SpikingConv:
            return SpikingConv(chs, spec.dim, 3, input_range=numbers, **unit_args(spec, neuron_layer), **dd)

        self.neuron = neuron_layer(**dd) if fires_before else nn.Identity()
        numbers = output_range(self.neuron) if fires_before else input_range
        convs = []
        for spec in units:
            convs.append(unit(in_chs, spec, numbers))
            in_chs, numbers = spec.dim, convs[-1].output_range
        self.main = nn.Sequential(*convs)
        self.output_range = numbers
        # Not position_neuron: torchvision takes that name for position.neuron, its pattern has a dot.
        self.position_input: nn.Module = nn.Identity()
        self.position = None
        if position is not None:
            if position.fires_before:
                self.position_input = neuron_layer(**dd)
                numbers = output_range(self.position_input)
            self.position = unit(in_chs, UnitSpec(in_chs, fires=position.fires), numbers)
            self.output_range = self.output_range.plus(self.position.output_range)

    def forward(self, x: Tensor) -> Tensor:
        y = self.main(self.neuron(x))
        if self.position is not None:
            y = y + self.position(self.position_input(y))
        return y


def unit_args(spec: UnitSpec, neuron_layer: NeuronLayer) -> dict[str, Any]:
    """Arguments of `SpikingConv`, or of the stem, for what a spec says beside the channels."""
    if spec.pool not in ("", "currents", "spikes"):
        raise ValueError(f'pool={spec.pool!r} of a unit must be "", "currents" or "spikes"')
    return {
        "stride": spec.stride,
        "pool": spec.pool == "currents",
        "pool_spikes": spec.pool == "spikes",
        "neuron_layer": neuron_layer if spec.fires else nn.Identity,
    }
