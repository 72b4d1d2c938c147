"""The attention operations alone, between Q, K, V and the projection, run by the layers' own code.

The paper's Table 1 and its comparison of memory (Fig. 4) are about this part: what makes X' of the spikes Q, K (and V).
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..layers import LIF, QKChannelAttention, QKTokenAttention, SpikingSelfAttention
from ..layers.neurons import NeuronLayer

__all__ = ["ATTENTION_CORES", "AttentionCore"]


class _Given(nn.Module):
    """Stands in for a layer of queries, keys or values and returns what it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.value = torch.empty(0)

    def forward(self, _x: Tensor) -> Tensor:
        return self.value


class _QuadraticAttention(SpikingSelfAttention):
    """SSA in the order that the papers write down, (Q K^T) V, with a matrix of N x N in between."""

    def forward(self, x: Tensor) -> Tensor:
        _, _, _, H, W = x.shape
        q = self.split_heads(self.q(x))
        k = self.split_heads(self.k(x))
        v = self.split_heads(self.v(x))
        y = v @ (k.transpose(-2, -1) @ q) * self.scale
        x = self.attn_neuron(y).flatten(2, 3).unflatten(3, [H, W])
        return self.proj_drop(self.proj(x))


# By what they are called in tables. This package runs SSA as Q (K^T V), as the release does.
ATTENTION_CORES: dict[str, Callable[..., nn.Module]] = {
    "QKTA": QKTokenAttention,
    "QKCA": QKChannelAttention,
    "SSA": SpikingSelfAttention,
    "SSA as (Q K^T) V": _QuadraticAttention,
}


class AttentionCore(nn.Module):
    """One of `ATTENTION_CORES` with one head, between spikes that are given and X'.

    Args:
        kind: Name in `ATTENTION_CORES`.
        dim: Channels D.
        neuron_layer: Factory of the attention's neuron.

    Raises:
        ValueError: For an unknown kind.
    """

    def __init__(self, kind: str, dim: int, neuron_layer: NeuronLayer = LIF) -> None:
        super().__init__()
        if kind not in ATTENTION_CORES:
            raise ValueError(f"kind={kind!r} is unknown, choose one of {list(ATTENTION_CORES)}")
        self.kind = kind
        self.attention = ATTENTION_CORES[kind](dim, num_heads=1, neuron_layer=neuron_layer, device="meta")
        self.inputs = ["q", "k", "v"] if hasattr(self.attention, "v") else ["q", "k"]
        for name in self.inputs:
            setattr(self.attention, name, _Given())
        self.attention.proj = nn.Identity()

    def forward(self, *spikes: Tensor) -> Tensor:
        """Q, K (and V) [T, B, C, H, W] to X' of the same shape."""
        for name, value in zip(self.inputs, spikes, strict=True):
            getattr(self.attention, name).value = value
        result: Tensor = self.attention(spikes[0])
        return result
