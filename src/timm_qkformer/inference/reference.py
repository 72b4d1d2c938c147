"""What the kernels of `kernels.cpp` compute, in torch operations. Runs on any device, and wherever the kernels cannot.

Tensors are channels last: [T, B, N, C] with N tokens, or [T, B, H, W, C] with pixels.
"""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from ..layers.recurrence import membrane_dtype
from .neurons import NeuronSpec

__all__ = ["channel_attention", "fire", "max_pool", "pool_fire", "self_attention", "token_attention"]


def fire(x: Tensor, neuron: NeuronSpec, sums: Tensor | None, out: Tensor) -> None:
    """Spikes of currents x [T, ...], with `sums` added if given, into `out` (which may be `sums`)."""
    spikes = neuron.fire(x).to(out.dtype)
    out.copy_(spikes if sums is None else sums + spikes)


def max_pool(x: Tensor) -> Tensor:
    """3x3 max pooling of stride 2: [T, B, H, W, C] to [T, B, ceil(H / 2), ceil(W / 2), C]."""
    pooled = F.max_pool2d(x.flatten(0, 1).permute(0, 3, 1, 2), kernel_size=3, stride=2, padding=1)
    return pooled.permute(0, 2, 3, 1).unflatten(0, x.shape[:2])


def pool_fire(x: Tensor, neuron: NeuronSpec, out: Tensor) -> None:
    """Spikes of max-pooled currents x [T, B, H, W, C] into `out` [T, B, ceil(H / 2), ceil(W / 2), C]."""
    fire(max_pool(x), neuron, None, out)


def _masked_keys(x: Tensor, heads: int, neurons: Sequence[NeuronSpec], out: Tensor, summed: int) -> None:
    of_q, of_k, of_attn = neurons
    q, k = (part.unflatten(-1, (heads, -1)) for part in x.chunk(2, dim=-1))  # [T, B, N, heads, channels]
    counts = of_q.fire(q).sum(summed, keepdim=True, dtype=membrane_dtype(x))
    mask = of_attn.fire(counts).to(x.dtype)
    out.copy_((mask * of_k.fire(k)).flatten(-2).view(out.shape))


def token_attention(x: Tensor, heads: int, neurons: Sequence[NeuronSpec], out: Tensor) -> None:
    """Q-K token attention: currents [T, B, N, 2 C] of queries and keys to masked keys [T, B, N, C].

    `neurons` of queries, keys and attention.
    """
    _masked_keys(x, heads, neurons, out, summed=-1)


def channel_attention(x: Tensor, heads: int, neurons: Sequence[NeuronSpec], out: Tensor) -> None:
    """Q-K channel attention: as `token_attention`, the queries summed over tokens."""
    _masked_keys(x, heads, neurons, out, summed=2)


def self_attention(x: Tensor, heads: int, scale: float, neurons: Sequence[NeuronSpec], out: Tensor) -> None:
    """Spiking self-attention: currents [T, B, N, 3 C] of queries, keys and values to spikes [T, B, N, C] of
    scale * Q (K^T V). `neurons` of queries, keys, values and attention.
    """
    dtype = membrane_dtype(x)  # counts are beyond half precision
    split = (part.unflatten(-1, (heads, -1)).transpose(2, 3) for part in x.chunk(3, dim=-1))
    q, k, v = (neuron.fire(part).to(dtype) for neuron, part in zip(neurons, split, strict=False))
    y = q @ (k.transpose(-2, -1) @ v) * scale  # [T, B, heads, N, channels]
    out.copy_(neurons[3].fire(y).transpose(2, 3).flatten(-2))
