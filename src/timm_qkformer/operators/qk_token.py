"""Q-K token attention: QKFormer (arXiv 2403.16552), section 3.2, Fig. 1, eq. 7 and 8. Linear in tokens and channels."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from ..execution.packing import Range
from ..neurons import SpikingNeuron
from .base import CHANNELS, TOKENS, NativeKernel, Operation, Operator, Views, register_operator, sum_channels

__all__ = ["QKTokenAttention"]


@register_operator("qkta")
class QKTokenAttention(Operator):
    """Q-K token attention (QKTA).

    Per head, a token is kept where the neuron of its summed queries fires:

        A_t = LIF(sum of Q over the head's channels) in {0, 1},  X' = A_t * K,  X'' = LIF(BN(proj X'))
    """

    if TYPE_CHECKING:  # TorchScript would take it for a type of its own
        attn_neuron: SpikingNeuron

    inputs = ("q", "k")
    inner_neurons = {"attn_neuron": {"v_threshold": 0.5}}
    neuron_names = {"attn_neuron": "A_t"}
    view_labels = {**Operator.view_labels, "tokens": "token mask $A_t$: 0 drops the token"}
    tokens_are_independent = True
    kernel: ClassVar[NativeKernel | None] = NativeKernel(__package__, "qk_token.cpp", "token_attention", ((1, None),))

    def attend(self, q: Tensor, k: Tensor) -> Tensor:
        mask = self.attn_neuron(sum_channels(q))
        return mask.to(k.dtype) * k

    def attended_range(self, q: Range, k: Range) -> Range:
        return self.attn_neuron.output_range.times(k)

    def operations(self, q: Tensor, k: Tensor) -> Sequence[Operation]:
        return [Operation("sum of Q", q, 1), Operation("mask of K", k, 1)]

    def views(self, inputs: Mapping[str, Tensor], inner: Mapping[str, Tensor], attended: Tensor) -> Views:
        return Views(tokens=inner["attn_neuron"].squeeze(CHANNELS), channels=attended.float().mean(TOKENS))
