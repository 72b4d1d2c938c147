"""Blocks and stages: what a spiking transformer repeats.

The two kinds of residual connection:

    activation before addition ("SEW")    x + LIF(BN(W s))     sums of spikes travel from block to block
    membrane shortcut ("MS")              x + BN(W LIF(x))     membrane potentials do

MS has a neuron in front of every weight layer and none after the addition (QKFormer, arXiv 2403.16552, eq. 17).
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..execution.packing import BINARY, Range
from ..execution.recompute import checkpoint_once
from ..neurons import LIF, NeuronLayer
from ..neurons.state import carried_state
from .conv import output_range
from .drop import TimeDropPath
from .mlp import SpikingMlp

# Factory of a token mixer, called as layer(dim, proj_drop=..., neuron_layer=..., membrane_shortcut=...,
# input_range=..., device=..., dtype=...).
MixerLayer = Callable[..., nn.Module]


class SpikingBranch(nn.Module):
    """A further token mixer of a block, with its own neuron in front with membrane shortcuts."""

    def __init__(self, neuron: nn.Module, mixer: nn.Module) -> None:
        super().__init__()
        self.neuron = neuron
        self.mixer = mixer

    def forward(self, x: Tensor) -> Tensor:
        return self.mixer(self.neuron(x))


class SpikingBlock(nn.Module):
    """x = x + mixer(x); x = x + mlp(x), on spike sums [T, B, C, H, W] (QKFormer, eq. 11 to 13).

    With membrane shortcuts x holds membrane potentials: x = x + mixer(LIF(x)); x = x + mlp(LIF(x)) (eq. 17). A block
    with several mixers adds them one after the other.

    Args:
        dim: Channels.
        mixer_layers: Factories of the token mixers.
        mlp_ratio: Hidden channels of the MLP relative to `dim`.
        mlp_layer: The kind of MLP.
        proj_drop: Dropout after every mixer and the MLP, one mask for all time steps.
        drop_path: Stochastic depth, one mask for all time steps.
        neuron_layer: Factory of the neurons.
        membrane_shortcut: See above.
        input_range: What x may hold.
    """

    def __init__(
        self,
        dim: int,
        mixer_layers: Sequence[MixerLayer],
        mlp_ratio: float = 4.0,
        proj_drop: float = 0.0,
        drop_path: float = 0.0,
        neuron_layer: NeuronLayer = LIF,
        membrane_shortcut: bool = False,
        input_range: Range = BINARY,
        mlp_layer: type[SpikingMlp] = SpikingMlp,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        args: dict[str, Any] = {"neuron_layer": neuron_layer, "membrane_shortcut": membrane_shortcut, **dd}
        numbers = input_range

        def neuron() -> nn.Module:
            return neuron_layer(**dd) if membrane_shortcut else nn.Identity()

        def seen_through(front: nn.Module) -> Range:
            return output_range(front) if membrane_shortcut else numbers

        self.neuron1 = neuron()
        self.attn = mixer_layers[0](dim, proj_drop=proj_drop, input_range=seen_through(self.neuron1), **args)
        numbers = numbers.plus(output_range(self.attn).dropped(drop_path > 0))
        self.more = nn.ModuleList()
        for layer in mixer_layers[1:]:
            front = neuron()
            mixer = layer(dim, proj_drop=proj_drop, input_range=seen_through(front), **args)
            self.more.append(SpikingBranch(front, mixer))
            numbers = numbers.plus(output_range(mixer).dropped(drop_path > 0))
        self.neuron2 = neuron()
        self.mlp = mlp_layer(dim, int(dim * mlp_ratio), proj_drop, input_range=seen_through(self.neuron2), **args)
        self.output_range = numbers.plus(self.mlp.output_range.dropped(drop_path > 0))
        self.drop_path = TimeDropPath(drop_path) if drop_path > 0.0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.attn(self.neuron1(x)))
        for branch in self.more:
            x = x + self.drop_path(branch(x))
        return x + self.drop_path(self.mlp(self.neuron2(x)))


class SpikingStage(nn.Module):
    """Patch embedding, then blocks: [T, B, C, H, W] to [T, B, C', H', W'], spike sums or membrane potentials.

    Args:
        embed: The embedding.
        blocks: The blocks.
    """

    def __init__(self, embed: nn.Module, blocks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.grad_checkpointing = False
        self.embed = embed
        self.blocks = nn.Sequential(*blocks)
        self.output_range = output_range(blocks[-1] if blocks else embed)

    def forward(self, x: Tensor) -> Tensor:
        if self.grad_checkpointing and not torch.jit.is_scripting():
            if carried_state() is None:  # potentials are to be taken once
                x = checkpoint_once(self.embed, x)
                for block in self.blocks:
                    x = checkpoint_once(block, x)
                return x
        return self.blocks(self.embed(x))
