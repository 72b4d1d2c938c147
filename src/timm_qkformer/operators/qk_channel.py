"""Q-K channel attention: QKFormer (arXiv 2403.16552), section 3.2, eq. 9 and 10. Linear in tokens and channels."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from ..execution.packing import Range
from ..neurons import SpikingNeuron
from .base import CHANNELS, TOKENS, NativeKernel, Operation, Operator, Views, register_operator, sum_tokens

__all__ = ["QKChannelAttention"]


@register_operator("qkca")
class QKChannelAttention(Operator):
    """Q-K channel attention (QKCA).

    A channel is kept, for all tokens at once, where the neuron of its queries, summed over the tokens, fires:

        A_c = LIF(sum of Q over the tokens) in {0, 1},  X' = A_c * K,  X'' = LIF(BN(proj X'))
    """

    if TYPE_CHECKING:  # TorchScript would take it for a type of its own
        attn_neuron: SpikingNeuron

    inputs = ("q", "k")
    inner_neurons = {"attn_neuron": {"v_threshold": 0.5}}
    neuron_names = {"attn_neuron": "A_c"}
    main_view = "channels"
    view_labels = {**Operator.view_labels, "channels": "mask $A_c$: 0 drops the channel"}
    kernel = NativeKernel(__package__, "qk_channel.cpp", "channel_attention", ((None, 1),))

    def attend(self, q: Tensor, k: Tensor) -> Tensor:
        mask = self.attn_neuron(sum_tokens(q))
        return mask.to(k.dtype) * k

    def attended_range(self, q: Range, k: Range) -> Range:
        return self.attn_neuron.output_range.times(k)

    def operations(self, q: Tensor, k: Tensor) -> Sequence[Operation]:
        return [Operation("sum of Q", q, 1), Operation("mask of K", k, 1)]

    def views(self, inputs: Mapping[str, Tensor], inner: Mapping[str, Tensor], attended: Tensor) -> Views:
        return Views(tokens=attended.float().mean(CHANNELS), channels=inner["attn_neuron"].squeeze(TOKENS))
