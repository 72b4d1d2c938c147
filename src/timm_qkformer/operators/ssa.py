"""Spiking self-attention: Spikformer (arXiv 2209.15425), eq. 5 and 6."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import check_number
from ..execution.convolution import matmul
from ..execution.packing import Range
from ..neurons import SpikingNeuron
from .base import CHANNELS, TOKENS, NativeKernel, Operation, Operator, Views, register_operator

__all__ = ["SpikingSelfAttention"]

SCALE = 0.125


@register_operator("ssa")
class SpikingSelfAttention(Operator):
    """Spiking self-attention (SSA), without softmax.

        X' = LIF(0.125 * Q (K^T V)),  X'' = LIF(BN(proj X'))

    Spikes are non-negative, so K^T V comes first and the cost is linear in tokens.

    Args:
        dim: Channels of the stage.
        scale: What stands as 0.125 above.
        **kwargs: See `Operator`.
    """

    if TYPE_CHECKING:  # TorchScript would take it for a type of its own
        attn_neuron: SpikingNeuron

    inputs = ("q", "k", "v")
    inner_neurons = {"attn_neuron": {"v_threshold": 0.5}}
    neuron_names = {"attn_neuron": "X'"}
    view_labels = {
        **Operator.view_labels,
        "tokens": "attention received by token j: mean of $s\\,q_i \\cdot k_j$ over all queries i",
    }
    couples_batch = True
    built_last = ("v",)
    kernel = NativeKernel(__package__, "ssa.cpp", "self_attention", ((None, None),), SCALE)
    scale: torch.jit.Final[float]

    def __init__(self, dim: int, *args: Any, scale: float = SCALE, **kwargs: Any) -> None:
        super().__init__(dim, *args, **kwargs)
        self.scale = check_number("scale", scale)

    def native_kernel(self) -> NativeKernel | None:
        return self.kernel._replace(scale=self.scale) if self.kernel is not None else None

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        # Heads are stored [channels, tokens], so (Q (K^T V))^T = (V K^T) Q.
        return self.attn_neuron(matmul(matmul(v, k.transpose(-2, -1)), q) * self.scale)

    def attended_range(self, q: Range, k: Range, v: Range) -> Range:
        return self.attn_neuron.output_range

    def operations(self, q: Tensor, k: Tensor, v: Tensor) -> Sequence[Operation]:
        # K^T V adds where a token has spikes in both.
        meetings = _of_tokens(k) * _of_tokens(v)
        return [
            Operation("K^T V", k, self.head_dim, float(meetings.sum())),
            Operation("Q (K^T V)", q, self.head_dim),
        ]

    def views(self, inputs: Mapping[str, Tensor], inner: Mapping[str, Tensor], attended: Tensor) -> Views:
        """Of tokens, the attention that each receives: scale * (q_i . k_j) of token j, averaged over all queries i."""
        mean_query = inputs["q"].float().mean(TOKENS, keepdim=True)
        received = self.scale * (mean_query * inputs["k"]).sum(CHANNELS)
        return Views(tokens=received, channels=attended.float().mean(TOKENS))


def _of_tokens(spikes: Tensor) -> Tensor:
    """Spikes of each head's tokens [T, B, heads, tokens]."""
    return spikes.abs().sum(CHANNELS, dtype=torch.float64)
