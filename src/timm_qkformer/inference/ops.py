"""Neurons and attention of deployed models: by a fused kernel where there is one, else in torch operations.

Tensors are channels last, [T, B, N, C] or [T, B, H, W, C]. Input currents are contiguous within a step, C last; a step
may lie anywhere behind the one before it, or all steps at the same place (`expand`). `dtype` is that of the spikes.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..layers.native import neuron_operand
from . import reference
from .native import kernel
from .neurons import NeuronSpec

__all__ = ["channel_attention", "fire", "pool_fire", "self_attention", "token_attention"]


def fire(
    x: Tensor, neuron: NeuronSpec, dtype: torch.dtype, sums: Tensor | None = None, out: Tensor | None = None
) -> Tensor:
    """Spikes of input currents x [T, ...].

    Args:
        x: Input currents.
        neuron: The neurons.
        dtype: Of the result, if `out` is not given.
        sums: Spike sums of x's shape and the result's dtype that the spikes are added to.
        out: Where the result goes, `sums` for instance.
    """
    if out is None:
        out = torch.empty(x.shape, dtype=dtype, device=x.device)
    run = kernel("fire", x, out)
    if run is None or not all(_has_dense_steps(tensor) for tensor in (x, sums, out)):
        reference.fire(x, neuron, sums, out)
    else:
        run(
            *(x.data_ptr(), x.stride(0)),
            *((None, 0) if sums is None else (sums.data_ptr(), sums.stride(0))),
            *(out.data_ptr(), out.stride(0)),
            *(x.shape[0], x[0].numel(), neuron_operand(neuron), torch.get_num_threads()),
        )
    return out


def _has_dense_steps(x: Tensor | None) -> bool:
    return x is None or x[0].is_contiguous()


def pool_fire(x: Tensor, neuron: NeuronSpec, dtype: torch.dtype) -> Tensor:
    """Spikes of max-pooled currents: x [T, B, H, W, C] to [T, B, ceil(H / 2), ceil(W / 2), C]."""
    T, B, H, W, C = x.shape
    out = torch.empty(T, B, (H + 1) // 2, (W + 1) // 2, C, dtype=dtype, device=x.device)
    run = kernel("pool_fire", x, out)
    if run is None or not _has_dense_steps(x):
        reference.pool_fire(x, neuron, out)
    else:
        operands = (neuron_operand(neuron), torch.get_num_threads())
        run(x.data_ptr(), x.stride(0), out.data_ptr(), T, B, H, W, C, *operands)
    return out


def token_attention(x: Tensor, heads: int, neurons: Sequence[NeuronSpec], dtype: torch.dtype) -> Tensor:
    """Q-K token attention: currents x [T, B, N, 2 C] of queries and keys to masked keys [T, B, N, C]."""
    return _masked_keys("token_attention", x, heads, neurons, dtype)


def channel_attention(x: Tensor, heads: int, neurons: Sequence[NeuronSpec], dtype: torch.dtype) -> Tensor:
    """Q-K channel attention: currents x [T, B, N, 2 C] of queries and keys to masked keys [T, B, N, C]."""
    return _masked_keys("channel_attention", x, heads, neurons, dtype)


def _masked_keys(name: str, x: Tensor, heads: int, neurons: Sequence[NeuronSpec], dtype: torch.dtype) -> Tensor:
    x, out = _attended(x, 2, dtype)
    run = kernel(name, x, out)
    if run is None:
        getattr(reference, name)(x, heads, neurons, out)
    else:
        run(x.data_ptr(), out.data_ptr(), *out.shape, heads, neuron_operand(*neurons), torch.get_num_threads())
    return out


def self_attention(x: Tensor, heads: int, scale: float, neurons: Sequence[NeuronSpec], dtype: torch.dtype) -> Tensor:
    """Spiking self-attention: currents x [T, B, N, 3 C] of queries, keys and values to spikes [T, B, N, C]."""
    x, out = _attended(x, 3, dtype)
    run = kernel("self_attention", x, out)
    if run is None:
        reference.self_attention(x, heads, scale, neurons, out)
    else:
        operands = (neuron_operand(*neurons), torch.get_num_threads())
        run(x.data_ptr(), out.data_ptr(), *out.shape, heads, scale, *operands)
    return out


def _attended(x: Tensor, parts: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return x.contiguous(), torch.empty(*x.shape[:3], x.shape[3] // parts, dtype=dtype, device=x.device)
