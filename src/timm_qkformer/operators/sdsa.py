"""Spike-driven self-attention, linear in tokens and channels: Spike-driven Transformer (arXiv 2307.01694), eq. 6."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..execution.packing import Range
from ..layers.conv import unflatten
from ..neurons import SpikingNeuron
from .base import CHANNELS, TOKENS, Operation, Operator, Views, register_operator, sum_tokens

__all__ = ["SpikeDrivenSelfAttention"]


@register_operator("sdsa")
class SpikeDrivenSelfAttention(Operator):
    """Spike-driven self-attention (SDSA): no products of matrices, only masks.

    Per head, a channel of Q is kept where the neuron of its summed products of K and V fires:

        S = LIF(sum of K * V over the tokens) in {0, 1},  X' = S * Q,  X'' = LIF(BN(proj X'))

    Args:
        dim: Channels of the stage.
        dvs_mode: The release's max pooling of 3x3, stride 1, for event cameras: of K and of V over the map; then, as
            the release has it, of K * V and of X' over the plane of a head's tokens and channels, which is not a map.
        **kwargs: See `Operator`.
    """

    if TYPE_CHECKING:  # TorchScript would take it for a type of its own
        mask_neuron: SpikingNeuron

    inputs = ("q", "k", "v")
    inner_neurons = {"mask_neuron": {"v_threshold": 0.5}}
    neuron_names = {"mask_neuron": "S"}
    main_view = "channels"
    view_labels = {**Operator.view_labels, "channels": "channel mask $S$: 0 drops the channel"}
    needs_map = True
    dvs_mode: torch.jit.Final[bool]

    def __init__(self, dim: int, *args: Any, dvs_mode: bool = False, **kwargs: Any) -> None:
        super().__init__(dim, *args, **kwargs)
        self.dvs_mode = dvs_mode

    def attend(self, q: Tensor, k: Tensor, v: Tensor, H: int, W: int) -> Tensor:
        mask = self.mask_neuron(sum_tokens(self.products(k, v, H, W)))
        kept = q * mask.to(q.dtype)
        return pool_plane(kept) if self.dvs_mode else kept

    def products(self, k: Tensor, v: Tensor, H: int, W: int) -> Tensor:
        """K * V, with the pooling of `dvs_mode` before and after the product."""
        if not self.dvs_mode:
            return k * v
        return pool_plane(pool_map(k, H, W) * pool_map(v, H, W))

    def attended_range(self, q: Range, k: Range, v: Range) -> Range:
        return q.times(self.mask_neuron.output_range)

    def operations(self, q: Tensor, k: Tensor, v: Tensor, H: int, W: int) -> Sequence[Operation]:
        products = self.products(k, v, H, W)
        return [
            Operation("product of K and V", pool_map(k, H, W) if self.dvs_mode else k, 1),
            Operation("sum of K V", products, 1),
            Operation("mask of Q", q, 1),
        ]

    def views(self, inputs: Mapping[str, Tensor], inner: Mapping[str, Tensor], attended: Tensor) -> Views:
        return Views(tokens=attended.float().mean(CHANNELS), channels=inner["mask_neuron"].float().squeeze(TOKENS))


def pool_plane(x: Tensor) -> Tensor:
    """3x3 max pooling of stride 1 over the last two dimensions of [..., N, M]."""
    return F.max_pool2d(x.flatten(0, 1), 3, 1, 1).reshape(x.shape)  # a batch of planes, none among them


def pool_map(x: Tensor, H: int, W: int) -> Tensor:
    """`pool_plane` over the map of tokens: [T, B, heads, channels, H * W]."""
    return F.max_pool2d(unflatten(x.flatten(0, 2), 2, [H, W]), 3, 1, 1).reshape(x.shape)
