"""Stochastic depth and dropout for sequences: one mask per sample, shared by its T time steps.

A fresh mask per step would turn a sample's spike train into a mixture of sub-networks, and timm's `DropPath`
masks dimension 0, which here is time.
"""

import torch
import torch.nn.functional as F
from timm.layers import DropPath, register_notrace_module
from torch import Tensor, nn


@register_notrace_module
class TimeDropPath(nn.Module):
    """Stochastic depth per sample: [T, B, ...] to [T, B, ...], a sample is kept or dropped at all steps.

    Args:
        drop_prob: Probability of dropping a sample.
        scale_by_keep: Divide what is kept by 1 - drop_prob.
    """

    def __init__(self, drop_prob: float = 0.0, scale_by_keep: bool = True) -> None:
        super().__init__()
        self.drop = DropPath(drop_prob, scale_by_keep)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(x.transpose(0, 1)).transpose(0, 1)


@register_notrace_module
class TimeDropout(nn.Module):
    """Dropout per element: [T, B, ...] to [T, B, ...], an element is kept or dropped at all steps.

    Args:
        p: Probability of dropping an element.
    """

    def __init__(self, p: float = 0.0) -> None:
        super().__init__()
        if not 0.0 <= p <= 1.0:
            raise ValueError(f"p={p} must be a probability, between 0 and 1")
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0.0:
            return x
        # Drawn in the order of the dimensions, whatever the memory format: a seed gives the same mask for all formats.
        ones = torch.ones_like(x[0], memory_format=torch.contiguous_format)
        return x * F.dropout(ones, self.p, training=True)

    def extra_repr(self) -> str:
        return f"p={self.p}"
