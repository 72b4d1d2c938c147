"""`output_stride`, as timm's convolutional networks have it: from some stride on, dilate instead of halving the size.

Where a pooling or a stride would make maps coarser than asked for, it becomes one of stride 1, and all that looks at
neighbours behind it looks twice as far: what the network computed at every second pixel it computes at each of them
(DeepLab, arXiv 1606.00915, section 3.1). Weights are the same; batch norms and attention see more pixels.
"""

from collections.abc import Iterable
from math import inf
from typing import Any

from torch import nn

from ..layers import SpikingChain, SpikingPatchEmbed, SpikingStage


def dilate(stem_stride: int, stages: Iterable[SpikingStage], output_stride: int) -> list[int]:
    """Change stages in place so that no map is coarser than `output_stride` pixels; the stride after each of them.

    Args:
        stem_stride: Stride of what comes before the stages, which is left alone.
        stages: `SpikingStage`s with their strides, in order.
        output_stride: Pixels of the input that a pixel of a map may stand for, along each side.

    Raises:
        ValueError: For an `output_stride` below that of the stem.
    """
    if isinstance(output_stride, bool) or not isinstance(output_stride, int) or output_stride < stem_stride:
        raise ValueError(
            f"output_stride={output_stride!r} must be a whole number, 8 or 16 for instance, and at least "
            f"{stem_stride}, the stride of the first convolution"
        )
    walk, strides = _Walk(stem_stride, output_stride), []
    for stage in stages:
        walk.through(stage.embed)
        for part in stage.blocks.modules():
            if isinstance(part, nn.Conv2d):
                _spread(part, walk.dilation)
        strides.append(walk.stride)
    return strides


class _Walk:
    """From layer to layer: the stride up to here, and how far apart neighbours are."""

    def __init__(self, stride: int, limit: int) -> None:
        self.stride, self.limit, self.dilation = stride, limit, 1

    def through(self, embed: Any) -> None:
        """An embedding."""
        assert isinstance(embed, (SpikingPatchEmbed, SpikingChain))
        stride, dilation = self.stride, self.dilation
        for unit in embed.main:
            for name in ("conv", "pool", "spike_pool"):
                setattr(unit, name, self.layer(getattr(unit, name)))
        if isinstance(embed, SpikingChain):
            if embed.position is not None:
                _spread(embed.position.conv, self.dilation)
            return
        embed.stride = self.stride // stride
        if embed.shortcut is not None:  # it goes over what the other branch leaves out
            if embed.shortcut.conv.stride != (1, 1):
                embed.shortcut.conv.stride = (embed.stride, embed.stride)
            elif embed.stride == 1:
                embed.shortcut.pool = _keeping_size(embed.shortcut.pool, dilation)

    def layer(self, layer: Any) -> nn.Module:
        """What takes the place of a convolution, a pooling, or the `nn.Identity` in the place of one."""
        step = 1 if isinstance(layer, nn.Identity) else _stride_of(layer)
        if isinstance(layer, nn.Conv2d):
            _spread(layer, self.dilation)
        if self.stride * step <= self.limit:
            self.stride *= step
        else:
            layer = _keeping_size(layer, self.dilation)
            self.dilation *= step
        kept: nn.Module = layer
        return kept


def _stride_of(layer: Any) -> int:
    return int(layer.stride[0] if isinstance(layer.stride, tuple) else layer.stride)


def _keeping_size(layer: Any, dilation: int) -> Any:
    """Of stride 1: a convolution, whose neighbours are as far apart by now, or a pooling of 3x3."""
    if isinstance(layer, nn.Conv2d):
        layer.stride = (1, 1)
    elif isinstance(layer, nn.MaxPool2d):
        pool = nn.MaxPool2d(3, 1, dilation=dilation)
        return nn.Sequential(nn.ConstantPad2d(dilation, -inf), pool)  # it pads by half a kernel at most itself
    return layer


def _spread(conv: nn.Conv2d, dilation: int) -> None:
    """Let a convolution that keeps the size look `dilation` times as far."""
    height, width = conv.kernel_size
    if dilation > 1 and (height, width) != (1, 1):
        conv.dilation = (dilation, dilation)
        conv.padding = (height // 2 * dilation, width // 2 * dilation)
