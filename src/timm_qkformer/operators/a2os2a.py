"""Accurate addition-only spiking self-attention: A2OS2A (arXiv 2503.00226).

The authors have published no code. What the paper says, and what is inferred here:

    said       Q binary, K real through ReLU, V ternary: every product has a factor in {-1, 0, 1} and is an addition
    said       X' = SN(Q K^T V), in heads, without softmax and without a scale
    inferred   an output projection with batch norm after X': with one, the spike-driven backbone has the published
               29.69 M (8-512) and 36.01 M (10-512) parameters, without one 27.58 and 33.37
    inferred   V's neuron fires sign(H) where |H| >= V_th and then starts again from 0; tau 2 and V_th 1, as this
               package's LIF. The authors' ternary-spike code has the decay 0.25 and an effective threshold of 0.5:
               value_neuron={"tau": 4 / 3, "decay_input": False, "v_threshold": 0.5}
    inferred   SN is the model's neuron with V_th 1, as no other threshold is mentioned
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import check_number
from ..execution.convolution import matmul
from ..execution.packing import Range
from ..neurons import LIF, NeuronLayer, ReLUNeuron, SpikingNeuron
from .base import CHANNELS, Operation, Operator, register_operator

__all__ = ["AdditionOnlyAttention"]


class TernaryLIF(LIF):
    """LIF neurons that fire -1, 0 or 1: sign(H) where |H| reaches the threshold."""

    levels = "ternary"


@register_operator("a2os2a")
class AdditionOnlyAttention(Operator):
    """Accurate addition-only spiking self-attention (A2OS2A):

        Q = SN(BN(W_q x)) in {0, 1},  K = max(BN(W_k x), 0),  V = SN_t(BN(W_v x)) in {-1, 0, 1}
        X' = SN(Q (K^T V)),  X'' = SN(BN(proj X'))

    Args:
        dim, num_heads: See `Operator`.
        value_neuron: Arguments of V's ternary LIF neurons: `tau`, `v_threshold`, `decay_input`, ...; see this file's
            first lines.
        attn_threshold: Threshold of the neuron after Q K^T V.
        **kwargs: See `Operator`. `neuron_layer` is that of Q, X' and X''.
    """

    if TYPE_CHECKING:  # TorchScript would take it for a type of its own
        attn_neuron: SpikingNeuron

    inputs = ("q", "k", "v")
    fed = ("v",)
    inner_neurons = {"attn_neuron": {"v_threshold": 1.0}}
    neuron_names = {"attn_neuron": "X'"}

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        value_neuron: Mapping[str, Any] | None = None,
        attn_threshold: float = 1.0,
        **kwargs: Any,
    ) -> None:
        if value_neuron is not None and not isinstance(value_neuron, Mapping):
            raise ValueError(f"value_neuron={value_neuron!r} must be arguments of neurons by their names")
        self.value_neuron = dict(value_neuron or {})
        inner_args = {"attn_neuron": {"v_threshold": check_number("attn_threshold", attn_threshold)}}
        super().__init__(dim, num_heads, inner_args=inner_args, **kwargs)

    def input_neuron(self, name: str, layer: NeuronLayer) -> NeuronLayer:
        layers: dict[str, NeuronLayer] = {"k": ReLUNeuron, "v": partial(TernaryLIF, **self.value_neuron)}
        return layers.get(name, layer)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        # Heads are stored [channels, tokens], so (Q (K^T V))^T = (V K^T) Q.
        return self.attn_neuron(matmul(matmul(v, k.transpose(-2, -1)), q))

    def attended_range(self, q: Range, k: Range, v: Range) -> Range:
        return self.attn_neuron.output_range

    def operations(self, q: Tensor, k: Tensor, v: Tensor) -> Sequence[Operation]:
        # K^T V adds a row of K to the sums of each V that fires, where K is not zero.
        meetings = _of_tokens(k != 0) * _of_tokens(v)
        return [
            Operation("K^T V", v, self.head_dim, float(meetings.sum())),
            Operation("Q (K^T V)", q, self.head_dim),
        ]


def _of_tokens(spikes: Tensor) -> Tensor:
    """What is not zero in each head's tokens [T, B, heads, tokens]."""
    return spikes.ne(0).sum(CHANNELS, dtype=torch.float64)
