"""Spiking experts: the mixture of experts that SEMM (Spiking Experts Mixture Mechanism, NeurIPS 2024) puts in the place
of self-attention's heads.

The facts are those of the public code known, STEP's (github.com/Fancyssc/STEP), which has two forms; see the arguments.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..errors import check_number, check_whole
from ..execution.convolution import matmul
from ..execution.packing import Range
from ..layers import SpikingConv
from ..layers.conv import unflatten
from ..neurons import SpikingNeuron
from .base import CHANNELS, Operation, Operator, register_operator

__all__ = ["ExpertsAttention"]

EXPERTS = 4


@register_operator("experts")
class ExpertsAttention(Operator):
    """Four experts that share keys and values, and a router that chooses among them for each token:

        K, Q_e = LIF(BN(W x)) of `expert_dim` channels, V of all, R in {0, 1} of one channel for each expert
        Z_e = LIF(scale * Q_e (K^T V)),  X' = sum of R_e * Z_e,  X'' = LIF(BN(proj X'))

    A token may choose several experts or none, so X' holds whole numbers up to 4. There are no heads.

    Args:
        dim: Channels of the stage.
        num_heads: Taken as by every operator.
        expert_dim: Channels of K and of each Q_e.
        scale: See above; 0.125 in STEP's CIFAR model, 1 in its ImageNet model.
        norm: Normalise K and V (CIFAR) or let their neurons take W x (ImageNet, which declares the batch norms and does
            not call them).
        router_misread: Reproduce STEP's CIFAR model, which reads each step's R, a matrix [experts, tokens], as
            [tokens, experts] without transposing it: token n's choice of expert e is element n * 4 + e.
        **kwargs: See `Operator`. `qkv_bias` is that of K, V and Q_e (CIFAR has one); the router has a bias always.
    """

    if TYPE_CHECKING:  # TorchScript would take it for a type of its own
        k: SpikingConv
        v: SpikingConv
        r: SpikingConv
        z1_neuron: SpikingNeuron
        z2_neuron: SpikingNeuron
        z3_neuron: SpikingNeuron
        z4_neuron: SpikingNeuron

    inputs = ("k", "v", "r", "q1", "q2", "q3", "q4")
    inner_neurons = {f"z{e}_neuron": {} for e in range(1, EXPERTS + 1)}
    neuron_names = {f"z{e}_neuron": f"Z_{e}" for e in range(1, EXPERTS + 1)}

    def __init__(
        self,
        dim: int,
        num_heads: int = 1,
        expert_dim: int = 96,
        scale: float = 0.125,
        norm: bool = True,
        router_misread: bool = False,
        device: Any = None,
        dtype: Any = None,
        **kwargs: Any,
    ) -> None:
        self.expert_dim = check_whole("expert_dim", expert_dim, 1)
        super().__init__(dim, num_heads=1, device=device, dtype=dtype, **kwargs)
        self.scale, self.router_misread = check_number("scale", scale), router_misread
        if self.r.conv.bias is None:  # the router has one whatever the others have
            self.r.conv.bias = nn.Parameter(torch.zeros(EXPERTS, device=device, dtype=dtype))
        if not norm:
            for unit in (self.k, self.v):
                setattr(unit, "bn", nn.Identity())  # noqa: B010, of another type

    def input_shape(self, name: str) -> tuple[int, int]:
        return 1, {"v": self.head_dim, "r": EXPERTS}.get(name, self.expert_dim)

    def routes(self, r: Tensor) -> Tensor:
        """R as [T, B, experts, 1, tokens]."""
        if self.router_misread:
            r = unflatten(r.flatten(3), 3, [-1, r.shape[3]]).transpose(3, 4)
        return r.transpose(2, 3)

    def attend(self, k: Tensor, v: Tensor, r: Tensor, q1: Tensor, q2: Tensor, q3: Tensor, q4: Tensor) -> Tensor:
        # Stored [channels, tokens], so (Q (K^T V))^T = (V K^T) Q.
        memory = matmul(v, k.transpose(-2, -1)) * self.scale
        routes = self.routes(r)
        return (
            self.z1_neuron(matmul(memory, q1)) * routes[:, :, 0:1]
            + self.z2_neuron(matmul(memory, q2)) * routes[:, :, 1:2]
            + self.z3_neuron(matmul(memory, q3)) * routes[:, :, 2:3]
            + self.z4_neuron(matmul(memory, q4)) * routes[:, :, 3:4]
        )

    def attended_range(self, k: Range, v: Range, r: Range, *queries: Range) -> Range:
        chosen = self.z1_neuron.output_range.times(r)
        return chosen.plus(chosen).plus(chosen.plus(chosen))

    def operations(self, k: Tensor, v: Tensor, r: Tensor, *queries: Tensor) -> Sequence[Operation]:
        memory = matmul(v, k.transpose(-2, -1)) * self.scale
        meetings = k.abs().sum(CHANNELS, dtype=torch.float64) * v.abs().sum(CHANNELS)
        counted = [Operation("K^T V", k, v.shape[CHANNELS], float(meetings.sum()))]
        routes = self.routes(r)
        for e, q in enumerate(queries, start=1):
            neuron = getattr(self, f"z{e}_neuron")
            z = matmul(memory, q)
            z = neuron.run(z)[0] if isinstance(neuron, SpikingNeuron) else z.ne(0).to(z.dtype)
            chosen = float((z * routes[:, :, e - 1 : e]).abs().sum())
            counted.append(Operation(f"Q_{e} (K^T V)", q, v.shape[CHANNELS]))
            counted.append(Operation(f"Z_{e} where R_{e}", z, 1, chosen))
        return counted
