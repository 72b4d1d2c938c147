"""From pixels to spikes, and from stage to stage: the stem and the spiking patch embedding with deformed shortcut
(SPEDS), QKFormer (arXiv 2403.16552), section 3.4 and Fig. 2.
"""

from collections.abc import Sequence
from typing import Any, Optional

from torch import Tensor, nn

from .conv import SpikingConv
from .neurons import LIF, NeuronLayer
from .sequence import as_sequence, count_time_steps

__all__ = ["SpikingPatchEmbed", "SpikingStem"]


class SpikingStem(SpikingConv):
    """The first spiking convolution: images [B, C, H, W] or event clips [B, T, C, H, W] to spikes [T, B, C', H', W'].

    A static image is the same at every step, so it is convolved once and its currents are broadcast over T.

    Args:
        in_chs: Channels of the input.
        out_chs: Channels of the output.
        pool: Halve the size before firing.
        min_size: Smallest side, in pixels, that the rest of the network can take.
        neuron_layer: Factory of the neurons.
    """

    def __init__(
        self,
        in_chs: int,
        out_chs: int,
        pool: bool = False,
        min_size: int = 1,
        neuron_layer: NeuronLayer = LIF,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(in_chs, out_chs, 3, pool=pool, neuron_layer=neuron_layer, device=device, dtype=dtype)
        self.in_chs = in_chs
        self.min_size = min_size

    def forward(self, x: Tensor, time_steps: int) -> Tensor:
        steps = count_time_steps(x, time_steps)
        x = self.currents(as_sequence(x, self.in_chs, self.min_size))
        return self.neuron(x.expand(steps, -1, -1, -1, -1))


class SpikingPatchEmbed(nn.Module):
    """y = F(x) + LIF(BN(conv1x1(x))): [T, B, C, H, W] to spike sums [T, B, C', H', W'] in {0, 1, 2}.

    F is a chain of 3x3 spiking convolutions. `pools` has one entry for each and says whether it pools before it
    fires; the 1x1 shortcut strides over what F pools away:

        (True, False)   conv BN pool LIF, conv BN LIF    (ImageNet models)
        (False, True)   conv BN LIF, conv BN pool LIF    (CIFAR and event models)
        (False,)        conv BN LIF                      (no downsampling)

    Any H and W will do: pooling and stride both round up.

    Args:
        in_chs: Channels of the input.
        out_chs: Channels of the output.
        pools: Which of the convolutions pool.
        hidden_chs: Channels between the convolutions, `out_chs` by default.
        shortcut: Add the shortcut branch.
        neuron_layer: Factory of the neurons.
    """

    def __init__(
        self,
        in_chs: int,
        out_chs: int,
        pools: Sequence[bool] = (True, False),
        hidden_chs: Optional[int] = None,
        shortcut: bool = True,
        neuron_layer: NeuronLayer = LIF,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        if len(pools) == 0:
            raise ValueError("pools=() is empty: give one True or False for every convolution of the embedding")
        args: dict[str, Any] = {"neuron_layer": neuron_layer, "device": device, "dtype": dtype}
        chs = [in_chs] + [hidden_chs or out_chs] * (len(pools) - 1) + [out_chs]
        self.stride = 2 ** sum(pools)
        self.main = nn.Sequential(
            *(SpikingConv(chs[i], chs[i + 1], 3, pool=pool, **args) for i, pool in enumerate(pools))
        )
        self.shortcut = SpikingConv(in_chs, out_chs, 1, stride=self.stride, **args) if shortcut else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.main(x)
        if self.shortcut is not None:
            y = y + self.shortcut(x)
        return y
