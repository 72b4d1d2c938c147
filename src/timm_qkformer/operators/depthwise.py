"""Depth-wise convolution in place of attention: Max-Former (arXiv 2505.18608), section 4.

Spiking neurons are low-pass filters; early in the network a small depth-wise convolution lets high frequencies
through that attention would average away, and costs less.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ..errors import check_whole
from ..layers.conv import SpikingConv
from .base import Operation, Operator, register_operator

__all__ = ["SpikingDepthwiseConv"]


@register_operator("dwc3", kernel_size=3)
@register_operator("dwc5", kernel_size=5)
@register_operator("dwc7", kernel_size=7)
class SpikingDepthwiseConv(Operator):
    """LIF(BN(depth-wise conv x)). It has no heads.

    Args:
        dim: Channels of the stage.
        kernel_size: Side of the kernel, odd.
        num_heads: Taken as by every operator.
        **kwargs: See `Operator`.

    Raises:
        ValueError: For an even kernel, which would change the size.
    """

    output = "dw"

    def __init__(self, dim: int, kernel_size: int = 7, num_heads: int = 1, **kwargs: Any) -> None:
        if check_whole("kernel_size", kernel_size, 1) % 2 == 0:
            raise ValueError(f"kernel_size={kernel_size} must be odd, so that the size stays the same")
        self.kernel_size = kernel_size
        super().__init__(dim, num_heads=1, **kwargs)

    def output_unit(self, dim: int, **args: Any) -> SpikingConv:
        return SpikingConv(dim, dim, self.kernel_size, groups=dim, **args)

    def operations(self, *inputs: Tensor) -> Sequence[Operation]:
        return []  # the convolution counts for itself, as all do

    def release_names(self, unit: str) -> tuple[str, str]:
        conv = "conv5" if self.kernel_size == 7 else "conv"
        return f"mixer.{conv}", f"mixer.{conv}_bn"
