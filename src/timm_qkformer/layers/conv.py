"""The units that the whole network is built from: convolution, batch norm, perhaps pooling; then neurons."""

from typing import Any, List

import torch
from torch import Tensor, nn

from ..execution.packing import REAL, Range, SharedInput
from ..neurons import LIF, NeuronLayer
from ..neurons.state import carried_state
from . import packed


def output_range(neuron: nn.Module) -> Range:
    """What a layer of neurons puts out; of other modules nothing is known."""
    known = getattr(neuron, "output_range", REAL)
    return known if isinstance(known, Range) else REAL


def unflatten(x: Tensor, dim: int, sizes: List[int]) -> Tensor:
    """`x.unflatten`, dim >= 0, in whose place ONNX's TorchScript exporter would write the example's sizes."""
    if not torch.jit.is_scripting():
        if torch.jit.is_tracing():
            return x.reshape([*x.shape[:dim], *sizes, *x.shape[dim + 1 :]])
    return x.unflatten(dim, sizes)


def max_pool() -> nn.MaxPool2d:
    """The pooling of all models: 3x3, of stride 2, [N, C, H, W] to [N, C, ceil(H / 2), ceil(W / 2)]."""
    return nn.MaxPool2d(kernel_size=3, stride=2, padding=1)


class ConvNorm(nn.Module):
    """Convolution, batch norm and (with `pool`) 3x3 max pooling of stride 2, on every time step alike.

    [T, B, C, H, W] to input currents [T, B, C', H', W'], where H' = ceil(H / stride), halved once more (rounding
    up) by the pooling, and W' likewise.

    Args:
        in_chs: Channels of the input.
        out_chs: Channels of the output.
        kernel_size: Side of the convolution's kernel, odd; the padding keeps the size.
        stride: Stride of the convolution.
        bias: Give the convolution a bias.
        pool: Pool after the batch norm.
        groups: Groups of the convolution; `in_chs` for a depth-wise one.
        input_range: What the input may hold: what training packs and deployment adds up follows from it.
    """

    def __init__(
        self,
        in_chs: int,
        out_chs: int,
        kernel_size: int = 1,
        stride: int = 1,
        bias: bool = False,
        pool: bool = False,
        groups: int = 1,
        input_range: Range = REAL,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        self.conv = nn.Conv2d(in_chs, out_chs, kernel_size, stride, kernel_size // 2, groups=groups, bias=bias, **dd)
        self.bn = nn.BatchNorm2d(out_chs, **dd)
        self.pool = max_pool() if pool else nn.Identity()
        self.input_range = input_range
        self.output_range = REAL

    def currents(self, x: Tensor) -> Tensor:
        if not torch.jit.is_scripting():
            if packed.is_active(self, x):
                return packed.currents(self, SharedInput(x, self.input_range))
        T, B, _, _, _ = x.shape
        return unflatten(self.pool(self.bn(self.conv(x.flatten(0, 1)))), 0, [T, B])

    def forward(self, x: Tensor) -> Tensor:
        return self.currents(x)


class SpikingConv(ConvNorm):
    """`ConvNorm`, then neurons, and (with `pool_spikes`) pooling of what they fire: [T, B, C, H, W] to [T, B, C', H',
    W'].

    Args:
        in_chs, out_chs, kernel_size, stride, bias, pool, groups, input_range: See `ConvNorm`.
        neuron_layer: Factory of the neurons. `nn.Identity`: none, the input currents are the result.
        pool_spikes: Pool as `pool` does, but after the neurons.
        batch_coupled: Reproduce a defect of the QKFormer release, whose last neuron in self-attention takes
            [T * B, ...] for its sequence and so carries the membrane potential from sample to sample.
    """

    def __init__(
        self,
        in_chs: int,
        out_chs: int,
        kernel_size: int = 1,
        stride: int = 1,
        bias: bool = False,
        pool: bool = False,
        groups: int = 1,
        input_range: Range = REAL,
        neuron_layer: NeuronLayer = LIF,
        batch_coupled: bool = False,
        pool_spikes: bool = False,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__(in_chs, out_chs, kernel_size, stride, bias, pool, groups, input_range, **dd)
        self.neuron = neuron_layer(**dd)
        self.spike_pool = max_pool() if pool_spikes else nn.Identity()
        self.pool_spikes = pool_spikes
        self.batch_coupled = batch_coupled
        self.output_range = output_range(self.neuron)

    def fire(self, x: Tensor) -> Tensor:
        """The neurons: input currents [T, B, C, H, W] to spikes."""
        if self.batch_coupled and x.shape[1] > 0:  # an empty batch has nobody to couple
            if not torch.jit.is_scripting():
                if carried_state() is not None:
                    raise ValueError("batch_coupled=True: neurons that couple the batch cannot run in pieces")
            T, B, _, _, _ = x.shape
            return self.pooled(unflatten(self.neuron(x.flatten(0, 1)), 0, [T, B]))
        return self.pooled(self.neuron(x))

    def pooled(self, x: Tensor) -> Tensor:
        """What is fired, [T, B, C, H, W], pooled if this unit pools spikes."""
        if not self.pool_spikes:
            return x
        if not torch.jit.is_scripting():
            if packed.is_active(self, x):
                return packed.pooled(self.spike_pool, x)
        T, B, _, _, _ = x.shape
        return unflatten(self.spike_pool(x.flatten(0, 1)), 0, [T, B])

    def forward(self, x: Tensor) -> Tensor:
        if not torch.jit.is_scripting():
            # A subclass may have currents or neurons of its own.
            if type(self) is SpikingConv and packed.is_active(self, x):
                return packed.spikes(self, SharedInput(x, self.input_range))
        return self.fire(self.currents(x))
