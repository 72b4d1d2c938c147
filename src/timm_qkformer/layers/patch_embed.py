"""From pixels to spikes, and from stage to stage: the stem and the spiking patch embedding with deformed shortcut
(SPEDS), QKFormer (arXiv 2403.16552), section 3.4 and Fig. 2; with membrane shortcuts, eq. 17; with more max pooling,
Max-Former (arXiv 2505.18608), section 4.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.fx
from torch import Tensor, nn

from ..execution.packing import BINARY, Range
from ..neurons import LIF, NeuronLayer
from . import packed
from .conv import SpikingConv, output_range
from .ends import as_sequence, count_time_steps

# One node each in a graph of torch.fx: they decide by the shape.
torch.fx.wrap("as_sequence")
torch.fx.wrap("count_time_steps")


class SpikingStem(SpikingConv):
    """The first spiking convolution: images [B, C, H, W] or event clips [B, T, C, H, W] to spikes [T, B, C', H', W'].

    A static image is the same at every step, so it is convolved once and its currents are broadcast over T.

    Args:
        in_chs: Channels of the input.
        out_chs: Channels of the output.
        pool: Halve the size by pooling before firing.
        pool_spikes: Halve it after firing.
        stride: Stride of the convolution.
        min_size: Smallest side, in pixels, that the rest of the network can take.
        neuron_layer: Factory of the neurons. `nn.Identity`: none, the result is currents [T, B, C', H', W'].
    """

    def __init__(
        self,
        in_chs: int,
        out_chs: int,
        pool: bool = False,
        stride: int = 1,
        min_size: int = 1,
        neuron_layer: NeuronLayer = LIF,
        pool_spikes: bool = False,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        args: dict[str, Any] = {"pool": pool, "pool_spikes": pool_spikes, "device": device, "dtype": dtype}
        super().__init__(in_chs, out_chs, 3, stride, neuron_layer=neuron_layer, **args)
        self.in_chs = in_chs
        self.min_size = min_size

    def forward(self, x: Tensor, time_steps: int) -> Tensor:  # type: ignore[override]
        steps = count_time_steps(x, time_steps)
        x = self.currents(as_sequence(x, self.in_chs, self.min_size))
        return self.fire(x.expand(steps, -1, -1, -1, -1))


class SpikingPatchEmbed(nn.Module):
    """y = F(x) + LIF(BN(conv1x1(x))): [T, B, C, H, W] to spike sums [T, B, C', H', W'] in {0, 1, 2}.

    F is a chain of 3x3 spiking convolutions. `pools` has one entry for each and says whether it pools before it
    fires; the 1x1 shortcut strides over what F pools away:

        (True, False)   conv BN pool LIF, conv BN LIF    (ImageNet models)
        (False, True)   conv BN LIF, conv BN pool LIF    (CIFAR and event models)
        (False,)        conv BN LIF                      (no downsampling)

    With `membrane_shortcut` one neuron fires before everything else, none at the ends of the two branches, and the
    result is membrane potentials: y = F'(s) + BN(conv1x1(s)), s = LIF(x), with F' = F short of its last neuron.

    Any H and W will do: pooling and stride both round up.

    Args:
        in_chs: Channels of the input.
        out_chs: Channels of the output.
        pools: Which of the convolutions pool.
        hidden_chs: Channels between the convolutions, `out_chs` by default.
        shortcut: Add the shortcut branch.
        strided: Let the convolutions stride instead of pooling after them.
        pool_shortcut: Let the shortcut pool, too, instead of striding; for embeddings that halve the size once.
        neuron_layer: Factory of the neurons.
        membrane_shortcut: Map membrane potentials to membrane potentials instead of spikes to spike sums.
        input_range: What the input may hold; real numbers with `membrane_shortcut`.

    Raises:
        ValueError: For no convolution, or a `pool_shortcut` that would have to do more than halve the size.
    """

    def __init__(
        self,
        in_chs: int,
        out_chs: int,
        pools: Sequence[bool] = (True, False),
        hidden_chs: int | None = None,
        shortcut: bool = True,
        strided: bool = False,
        pool_shortcut: bool = False,
        neuron_layer: NeuronLayer = LIF,
        membrane_shortcut: bool = False,
        input_range: Range = BINARY,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        if len(pools) == 0:
            raise ValueError("pools=() is empty: give one True or False for every convolution of the embedding")
        if pool_shortcut and sum(pools) != 1:
            raise ValueError(
                f"pool_shortcut=True halves the size once, pools={tuple(pools)} halve it {sum(pools)} times"
            )
        dd = {"device": device, "dtype": dtype}
        last_layer = nn.Identity if membrane_shortcut else neuron_layer
        chs = [in_chs] + [hidden_chs or out_chs] * (len(pools) - 1) + [out_chs]
        layers = [neuron_layer] * (len(pools) - 1) + [last_layer]
        self.stride = 2 ** sum(pools)
        self.neuron = neuron_layer(**dd) if membrane_shortcut else nn.Identity()
        spikes = output_range(self.neuron) if membrane_shortcut else input_range
        self.input_range = numbers = spikes  # of the first convolution and the shortcut
        convs = []
        args: dict[str, Any]
        for i, pool in enumerate(pools):
            stride = 2 if pool and strided else 1
            args = {"pool": pool and not strided, "input_range": numbers, "neuron_layer": layers[i], **dd}
            convs.append(SpikingConv(chs[i], chs[i + 1], 3, stride, **args))
            numbers = convs[-1].output_range
        self.main = nn.Sequential(*convs)
        self.output_range = numbers
        self.shortcut = None
        if shortcut:
            stride = 1 if pool_shortcut else self.stride
            args = {"pool": pool_shortcut, "input_range": spikes, "neuron_layer": last_layer, **dd}
            self.shortcut = SpikingConv(in_chs, out_chs, 1, stride, **args)
            self.output_range = numbers.plus(self.shortcut.output_range)

    def forward(self, x: Tensor) -> Tensor:
        x = self.neuron(x)
        if not torch.jit.is_scripting():
            if packed.is_active(self, x):
                return packed.embed(self, x)
        y = self.main(x)
        if self.shortcut is not None:
            y = y + self.shortcut(x)
        return y
