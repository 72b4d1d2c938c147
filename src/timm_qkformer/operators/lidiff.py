"""Attention with lateral inhibition, feedforward and feedback: SpiLiFormer (arXiv 2503.15986)."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ..layers.conv import unflatten
from .base import Operation, register_operator, sum_channels
from .qk_token import QKTokenAttention
from .ssa import SpikingSelfAttention

__all__ = ["FeedbackLateralAttention", "FeedforwardLateralAttention"]


@register_operator("ff_lidiff")
class FeedforwardLateralAttention(QKTokenAttention):
    """Q-K token attention in which two groups of queries inhibit each other (FF-LiDiff).

    The channels of Q are split into two halves and each half into heads of d / 2 channels. Per head, a token is kept
    where the first half's spikes outnumber the second's:

        A_t = LIF(sum of Q_1 over the head's channels - sum of Q_2) in {0, 1},  X' = A_t * K,  X'' = LIF(BN(proj X'))

    Raises:
        ValueError: For heads of an odd number of channels, besides what `Operator` raises.
    """

    kernel = None

    def __init__(self, dim: int, num_heads: int = 8, **kwargs: Any) -> None:
        super().__init__(dim, num_heads, **kwargs)
        if self.head_dim % 2 != 0:
            raise ValueError(
                f"num_heads={num_heads} gives heads of {self.head_dim} channels, dim={dim}: FF-LiDiff halves them, so "
                "their number must be even"
            )

    def attend(self, q: Tensor, k: Tensor) -> Tensor:
        halves = unflatten(q.flatten(2, 3), 2, [2, self.num_heads, self.head_dim // 2])
        mask = self.attn_neuron(sum_channels(halves[:, :, 0]) - sum_channels(halves[:, :, 1]))
        return mask.to(k.dtype) * k

    def operations(self, q: Tensor, k: Tensor) -> Sequence[Operation]:
        return [Operation("difference of sums of Q", q, 1), Operation("mask of K", k, 1)]

    def release_names(self, unit: str) -> tuple[str, str]:
        return f"tssa.{unit}_conv", f"tssa.{unit}_bn"


@register_operator("fb_lidiff")
class FeedbackLateralAttention(SpikingSelfAttention):
    """Spiking self-attention whose values also take the block's feedback f (FB-LiDiff):

        V = LIF(BN(W_v (x + f))),  X' = LIF(0.125 * Q (K^T V)),  X'' = LIF(BN(proj X'))

    Feedback comes from a `layers.FeedbackStage`; without any it is spiking self-attention.
    """

    fed = ("v",)
