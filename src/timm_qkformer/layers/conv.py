"""The units that the whole network is built from: convolution, batch norm, perhaps pooling; then neurons."""

from typing import Any

import torch
from torch import Tensor, nn

from . import lean
from .neurons import LIF, NeuronLayer

__all__ = ["ConvNorm", "SpikingConv"]


class ConvNorm(lean.LeanModule):
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
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        self.conv = nn.Conv2d(in_chs, out_chs, kernel_size, stride, kernel_size // 2, groups=groups, bias=bias, **dd)
        self.bn = nn.BatchNorm2d(out_chs, **dd)
        self.pool = nn.MaxPool2d(kernel_size=3, stride=2, padding=1) if pool else nn.Identity()

    def currents(self, x: Tensor) -> Tensor:
        T, B, _, _, _ = x.shape
        if self.is_lean(x):
            return self._pool_leanly(self.bn(self._conv_leanly(x))).unflatten(0, [T, B])
        return self.pool(self.bn(self.conv(x.flatten(0, 1)))).unflatten(0, [T, B])

    @torch.jit.unused
    def _conv_leanly(self, x: Tensor) -> Tensor:
        if lean.conv_runs_plainly(self.conv):
            return lean.conv_keeps_counts(self.conv, x)
        return self.conv(x.flatten(0, 1))

    @torch.jit.unused
    def _pool_leanly(self, x: Tensor) -> Tensor:
        if lean.pool_runs_plainly(self.pool):
            return lean.pool_keeps_places(x)
        return self.pool(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.currents(x)


class SpikingConv(ConvNorm):
    """`ConvNorm`, then neurons: [T, B, C, H, W] to spikes [T, B, C', H', W'].

    Args:
        in_chs, out_chs, kernel_size, stride, bias, pool, groups: See `ConvNorm`.
        neuron_layer: Factory of the neurons. `nn.Identity`: none, the input currents are the result.
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
        neuron_layer: NeuronLayer = LIF,
        batch_coupled: bool = False,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__(in_chs, out_chs, kernel_size, stride, bias, pool, groups, **dd)
        self.neuron = neuron_layer(**dd)
        self.batch_coupled = batch_coupled

    def forward(self, x: Tensor) -> Tensor:
        if self.is_lean(x) and self._may_fuse():
            return self._norm_and_fire(x)
        x = self.currents(x)
        if self.batch_coupled and x.shape[1] > 0:  # an empty batch has nobody to couple
            T, B, _, _, _ = x.shape
            return self.neuron(x.flatten(0, 1)).unflatten(0, [T, B])
        return self.neuron(x)

    @torch.jit.unused
    def _may_fuse(self) -> bool:
        return lean.runs_plainly(self.pool, nn.Identity) and not self.batch_coupled

    @torch.jit.unused
    def _norm_and_fire(self, x: Tensor) -> Tensor:
        T, B, _, _, _ = x.shape
        y = self._conv_leanly(x)
        if lean.norm_fires(self.bn, self.neuron, y):
            return lean.norm_and_fire(y, self.bn, self.neuron, T)
        return self.neuron(self.bn(y).unflatten(0, [T, B]))
