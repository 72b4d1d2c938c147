"""Spiking attention: Q-K token and channel attention (QKFormer, arXiv 2403.16552, section 3.2 and Fig. 1) and
spiking self-attention (Spikformer, arXiv 2209.15425, eq. 5 and 6).

All three map [T, B, C, H, W] to spikes of the same shape and run the same way for any H and W. With
`membrane_shortcut` they leave out the last neuron and return its input currents BN(proj X'), which a membrane
shortcut adds up (QKFormer, eq. 17).
"""

from typing import Any

import torch
from timm.layers import register_notrace_function
from torch import Tensor, nn

from . import lean
from .conv import SpikingConv
from .counts import counts_bound, move_note
from .drop import TimeDropout
from .neurons import LIF, NeuronLayer
from .recurrence import membrane_dtype

__all__ = ["QKChannelAttention", "QKTokenAttention", "SpikingSelfAttention"]

ATTN_THRESHOLD = 0.5


@register_notrace_function
def count_spikes(spikes: Tensor, dim: int) -> Tensor:
    """Sum over `dim`, kept as a dimension of 1, in a precision that half-precision sums of many spikes would lose."""
    return spikes.sum(dim, keepdim=True, dtype=membrane_dtype(spikes))


class _SpikingAttention(lean.LeanModule):
    """What the three share: Q and K, the neurons that fire on the attention, and the output projection."""

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        proj_drop: float = 0.0,
        neuron_layer: NeuronLayer = LIF,
        membrane_shortcut: bool = False,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        if num_heads < 1 or dim % num_heads != 0:
            raise ValueError(f"num_heads={num_heads} must divide the width of the stage, dim={dim}")
        dd = {"device": device, "dtype": dtype}
        last_layer = nn.Identity if membrane_shortcut else neuron_layer
        self.num_heads = num_heads
        self.head_dim = dim // num_heads
        self.q = SpikingConv(dim, dim, neuron_layer=neuron_layer, **dd)
        self.k = SpikingConv(dim, dim, neuron_layer=neuron_layer, **dd)
        self.attn_neuron = neuron_layer(v_threshold=ATTN_THRESHOLD, **dd)
        self.proj = SpikingConv(dim, dim, bias=True, neuron_layer=last_layer, **dd)
        self.proj_drop = TimeDropout(proj_drop)

    def split_heads(self, x: Tensor) -> Tensor:
        """[T, B, C, H, W] to [T, B, heads, C / heads, H * W]."""
        return x.flatten(3).unflatten(2, [self.num_heads, self.head_dim])

    def merge_heads(self, x: Tensor, H: int, W: int) -> Tensor:
        """[T, B, heads, C / heads, H * W] to [T, B, C, H, W]."""
        merged = x.flatten(2, 3).unflatten(3, [H, W])
        if not torch.jit.is_scripting():
            merged = move_note(x, merged)
        return merged

    @torch.jit.unused
    def _are_spikes(self, x: Tensor) -> bool:
        return counts_bound(x) == 1


class QKTokenAttention(_SpikingAttention):
    """Q-K token attention (QKTA), linear in tokens and channels.

    Per head, a token is kept where the neuron of its summed queries fires (eq. 7 and 8):

        a = LIF(sum of Q over the head's channels) in {0, 1},  X' = a * K,  X'' = LIF(BN(proj X'))

    Args:
        dim: Channels of the stage.
        num_heads: Heads, a divisor of `dim`.
        proj_drop: Dropout after the projection, one mask for all time steps.
        neuron_layer: Factory of the neurons.
        membrane_shortcut: Return input currents instead of spikes.
    """

    __constants__ = ("sum_dim",)  # for TorchScript
    sum_dim = 3  # of [T, B, heads, channels, tokens]

    def forward(self, x: Tensor) -> Tensor:
        _, _, _, H, W = x.shape
        q = self.split_heads(self.q(x))
        k = self.k(x)
        attn = self.attn_neuron(count_spikes(q, self.sum_dim))
        return self.proj_drop(self.proj(self.gate(attn, k, H, W)))

    def gate(self, attn: Tensor, k: Tensor, H: int, W: int) -> Tensor:
        """a * K, for `attn` [T, B, heads, channels, tokens] with a 1 in place of what was summed over."""
        if self.is_lean(k) and self._are_spikes(k):
            return self._gate_leanly(attn, k)
        return self.merge_heads(attn.to(k.dtype) * self.split_heads(k), H, W)

    @torch.jit.unused
    def _gate_leanly(self, attn: Tensor, k: Tensor) -> Tensor:
        return lean.gate_keeps_counts(attn, k, self.num_heads, self.sum_dim)


class QKChannelAttention(QKTokenAttention):
    """Q-K channel attention (QKCA): as QKTA, with the queries summed over the tokens (eq. 9 and 10), so that a
    channel is kept or dropped for all tokens at once. Arguments as in `QKTokenAttention`.
    """

    sum_dim = 4


class SpikingSelfAttention(_SpikingAttention):
    """Spiking self-attention (SSA): Y = LIF(scale * Q (K^T V)), X'' = LIF(BN(proj Y)), no softmax.

    Spikes are non-negative, so K^T V comes first and the cost is linear in tokens.

    Args:
        dim: Channels of the stage.
        num_heads: Heads, a divisor of `dim`.
        proj_drop: Dropout after the projection, one mask for all time steps.
        neuron_layer: Factory of the neurons.
        membrane_shortcut: Return input currents instead of spikes.
        batch_coupled: Let the last neuron integrate over time and batch, as the release does, see `SpikingConv`.

    Raises:
        ValueError: For `batch_coupled` together with `membrane_shortcut`, or heads that do not divide `dim`.
    """

    scale: torch.jit.Final[float] = 0.125

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        proj_drop: float = 0.0,
        neuron_layer: NeuronLayer = LIF,
        membrane_shortcut: bool = False,
        batch_coupled: bool = False,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(dim, num_heads, proj_drop, neuron_layer, membrane_shortcut, device, dtype)
        if batch_coupled and membrane_shortcut:
            raise ValueError(
                "batch_coupled=True couples the attention's last neuron, which membrane_shortcut=True leaves out: "
                "use one of them"
            )
        self.proj.batch_coupled = batch_coupled
        self.v = SpikingConv(dim, dim, neuron_layer=neuron_layer, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        _, _, _, H, W = x.shape
        y = self.mix(self.q(x), self.k(x), self.v(x))
        return self.proj_drop(self.proj(self.merge_heads(self.attn_neuron(y), H, W)))

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """scale * Q (K^T V), [T, B, C, H, W] each, to [T, B, heads, C / heads, H * W]."""
        if self.is_lean(q) and self._are_spikes(q) and self._are_spikes(k) and self._are_spikes(v):
            return self._mix_leanly(q, k, v)
        q, k, v = self.split_heads(q), self.split_heads(k), self.split_heads(v)
        # Heads are stored [channels, tokens], so (Q (K^T V))^T = (V K^T) Q.
        return (v @ k.transpose(-2, -1)) @ q * self.scale

    @torch.jit.unused
    def _mix_leanly(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return lean.mix_keeps_counts(q, k, v, self.num_heads, self.scale)
