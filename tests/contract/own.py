"""A new operator and a new neuron, defined outside of the package through public names alone."""

from timm_qkformer.neurons import LIF, register_neuron
from timm_qkformer.operators import Operation, Operator, Views, register_operator, sum_tokens


@register_operator("own_sdsa")
class SpikeDrivenAttention(Operator):
    """A channel of Q is kept where the neuron of K * V, summed over the tokens, fires (arXiv 2307.01694, eq. 6)."""

    inputs = ("q", "k", "v")
    inner_neurons = {"mask_neuron": {"v_threshold": 0.5}}
    neuron_names = {"mask_neuron": "S"}

    def attend(self, q, k, v):
        return q * self.mask_neuron(sum_tokens(k * v)).to(q.dtype)

    def attended_range(self, q, k, v):
        return q.times(self.mask_neuron.output_range)

    def operations(self, q, k, v):
        meetings = float((k * v).abs().sum())
        return [
            Operation("product of K and V", k, 1),
            Operation("sum of K V", k, 1, meetings),
            Operation("mask of Q", q, 1),
        ]

    def views(self, inputs, inner, attended):
        return Views(tokens=attended.mean(3), channels=inner["mask_neuron"].squeeze(4))


@register_neuron("own_ternary")
class TernaryLIF(LIF):
    """Fires -1, 0 or 1."""

    levels = "ternary"
