"""The parts of a deployed model, from stem to last block. Each is built from the part of the model it stands for.

Tensors are channels last, [T, B, H, W, C]. `spikes` is the dtype of spikes and spike sums, and with it the arithmetic
of the convolutions that take them. What shortcuts carry (spike sums, or membrane potentials in a model with membrane
shortcuts) is updated in place; tokens that do not see each other run in portions that stay in the processor's cache.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..layers import (
    ConvNorm,
    QKChannelAttention,
    QKTokenAttention,
    SpikingConv,
    SpikingDepthwiseConv,
    SpikingMlp,
    SpikingPatchEmbed,
    SpikingSelfAttention,
    SpikingStem,
)
from ..models._hst import SpikingBlock, SpikingStage
from . import ops, reference
from .neurons import DeployedNeuron, NeuronSpec
from .projection import Projection
from .weights import fold

__all__ = ["DeployedStage", "DeployedUnit"]

# Input currents, elements [T, tokens, C], that a portion of tokens may have in its widest layer: 16 MB in float32.
PORTION = 2**22


class DeployedUnit(nn.Module):
    """Convolution and neurons (`SpikingConv`, `SpikingStem`), pooling between them if there is any.

    Args:
        unit: What it stands for.
        name: What to call it in errors.
        dtype: Of the weights.
    """

    def __init__(self, unit: ConvNorm, name: str, dtype: torch.dtype) -> None:
        super().__init__()
        if type(unit) not in (SpikingConv, SpikingStem):
            raise TypeError(f"{name} is a {type(unit).__name__}, expected a SpikingConv")
        assert isinstance(unit, SpikingConv)
        self.projection = Projection([fold(unit, name)], unit.conv.stride[0], unit.conv.groups, dtype)
        self.neuron = DeployedNeuron.of(unit.neuron, f"{name}.neuron")
        self.pool = _pools(unit, name)
        self.batch_coupled = unit.batch_coupled

    def forward(self, x: Tensor, spikes: torch.dtype, time_steps: int | None = None, periodic: bool = False) -> Tensor:
        """Spikes [T, B, H', W', C'], or potentials in their own dtype where there are no neurons.

        `time_steps` of an image x [1, B, H, W, C] that is the same at each of them; x may be `periodic` spikes.
        """
        repeats = time_steps if time_steps is not None and len(x) == 1 else 1
        if self.neuron is not None and not self.pool and repeats == 1:
            return self.projection.fire(x, self.neuron.spec, spikes)
        currents = self.projection.currents(x, periodic)
        if self.pool and self.neuron is None:
            currents = reference.max_pool(currents)
        if repeats > 1:
            currents = currents.expand(repeats, -1, -1, -1, -1)
        if self.neuron is None:
            return currents
        if self.pool:
            return ops.pool_fire(currents, self.neuron.spec, spikes)
        return ops.fire(currents, self.neuron.spec, spikes)

    def fires_periodically(self, steps: int) -> bool:
        """Whether neurons fire at every k-th step, of an input of `steps` steps: where it is one for all."""
        return steps == 1 and self.neuron is not None and not self.neuron.spec.soft_reset

    def add_to(self, sums: Tensor, x: Tensor) -> None:
        """Add this unit's spikes (or potentials) for x to `sums`."""
        if self.pool:
            _add(sums, reference.max_pool(self.projection.currents(x)), self.neuron, self.batch_coupled)
        else:
            _project_and_add(sums, self.projection, x, self.neuron, self.batch_coupled)


def _pools(unit: ConvNorm, name: str) -> bool:
    pool = unit.pool
    if type(pool) is nn.Identity:
        return False
    if type(pool) is nn.MaxPool2d and (pool.kernel_size, pool.stride, pool.padding) == (3, 2, 1):
        return True
    raise TypeError(f"{name}.pool is {pool}, expected max pooling of 3x3, stride 2, padding 1, or none")


def _add(sums: Tensor, currents: Tensor, neuron: DeployedNeuron | None, batch_coupled: bool = False) -> None:
    if neuron is None:
        sums.add_(currents)
    elif batch_coupled:  # one sequence, sample after sample within a step
        joined = sums.view(-1, *sums.shape[2:])
        ops.fire(currents.flatten(0, 1), neuron.spec, sums.dtype, sums=joined, out=joined)
    else:
        ops.fire(currents, neuron.spec, sums.dtype, sums=sums, out=sums)


def _project_and_add(
    sums: Tensor, projection: Projection, x: Tensor, neuron: DeployedNeuron | None, batch_coupled: bool
) -> None:
    if neuron is None or batch_coupled:
        _add(sums, projection.currents(x), neuron, batch_coupled)
    else:
        projection.fire(x, neuron.spec, sums.dtype, sums)


class DeployedEmbed(nn.Module):
    """`SpikingPatchEmbed`: spike sums to spike sums, or potentials to potentials."""

    def __init__(self, embed: SpikingPatchEmbed, name: str, dtype: torch.dtype) -> None:
        super().__init__()
        units: list[Any] = list(embed.main)
        self.neuron = DeployedNeuron.of(embed.neuron, f"{name}.neuron")
        self.main = nn.ModuleList(DeployedUnit(unit, f"{name}.main.{i}", dtype) for i, unit in enumerate(units))
        self.shortcut = DeployedUnit(embed.shortcut, f"{name}.shortcut", dtype) if embed.shortcut is not None else None

    def forward(self, x: Tensor, spikes: torch.dtype, periodic: bool) -> Tensor:
        if self.neuron is not None:
            x = ops.fire(x, self.neuron.spec, spikes)
        y = x
        for i, unit in enumerate(self.main):
            y = unit(y, spikes, periodic=periodic and i == 0)
        if y.dtype == torch.bfloat16 and unit.neuron is None:
            y = y.float()  # potentials add up
        if self.shortcut is not None:
            self.shortcut.add_to(y, x)
        return y


class _Attention(nn.Module):
    """Q, K (and V) in one product, attention, projection: spikes [T, B, N, C] to spikes of the same shape."""

    parts = "qk"

    def __init__(self, attn: QKTokenAttention | SpikingSelfAttention, name: str, dtype: torch.dtype) -> None:
        super().__init__()
        units = {part: getattr(attn, part) for part in self.parts}
        for part, unit in [*units.items(), ("proj", attn.proj)]:
            if type(unit) is not SpikingConv or _pools(unit, f"{name}.{part}") or unit.conv.kernel_size != (1, 1):
                raise TypeError(f"{name}.{part} is {unit}, expected a SpikingConv of 1x1 without pooling")
        self.num_heads = attn.num_heads
        self.inputs = Projection([fold(unit, f"{name}.{part}") for part, unit in units.items()], 1, 1, dtype)
        neurons = [_of(unit.neuron, f"{name}.{part}.neuron") for part, unit in units.items()]
        self.neurons = nn.ModuleList([*neurons, _of(attn.attn_neuron, f"{name}.attn_neuron")])
        self.proj = Projection([fold(attn.proj, f"{name}.proj")], 1, 1, dtype)
        self.neuron = DeployedNeuron.of(attn.proj.neuron, f"{name}.proj.neuron")
        self.batch_coupled = attn.proj.batch_coupled

    @property
    def specs(self) -> list[NeuronSpec]:
        """Of the neurons of queries, keys, values if there are any, and attention."""
        return [neuron.spec for neuron in self.neurons if isinstance(neuron, DeployedNeuron)]

    def attend(self, x: Tensor, spikes: torch.dtype) -> Tensor:
        raise NotImplementedError

    @property
    def last(self) -> Projection:
        return self.proj

    def forward(self, x: Tensor, spikes: torch.dtype) -> Tensor:
        return self.attend(self.inputs.currents(x), spikes)


def _of(neuron: nn.Module, name: str) -> DeployedNeuron:
    deployed = DeployedNeuron.of(neuron, name)
    if deployed is None:
        raise TypeError(f"{name} is nn.Identity, expected neurons")
    return deployed


class _TokenAttention(_Attention):
    def attend(self, x: Tensor, spikes: torch.dtype) -> Tensor:
        return ops.token_attention(x, self.num_heads, self.specs, spikes)


class _ChannelAttention(_Attention):
    def attend(self, x: Tensor, spikes: torch.dtype) -> Tensor:
        return ops.channel_attention(x, self.num_heads, self.specs, spikes)


class _SelfAttention(_Attention):
    parts = "qkv"

    def __init__(self, attn: SpikingSelfAttention, name: str, dtype: torch.dtype) -> None:
        super().__init__(attn, name, dtype)
        self.scale = attn.scale

    def attend(self, x: Tensor, spikes: torch.dtype) -> Tensor:
        return ops.self_attention(x, self.num_heads, self.scale, self.specs, spikes)


class _DepthwiseConv(nn.Module):
    """Depth-wise convolution of spikes [T, B, H, W, C]."""

    def __init__(self, mixer: SpikingDepthwiseConv, name: str, dtype: torch.dtype) -> None:
        super().__init__()
        self.dw = DeployedUnit(mixer.dw, f"{name}.dw", dtype)
        self.batch_coupled = self.dw.batch_coupled

    @property
    def neuron(self) -> DeployedNeuron | None:
        return self.dw.neuron

    @property
    def last(self) -> Projection:
        return self.dw.projection

    def forward(self, x: Tensor, spikes: torch.dtype) -> Tensor:
        return x


class _Mlp(nn.Module):
    """Spikes [T, B, N, C] to those of the hidden layer, [T, B, N, C']."""

    batch_coupled = False

    def __init__(self, mlp: SpikingMlp, name: str, dtype: torch.dtype) -> None:
        super().__init__()
        self.fc1 = DeployedUnit(mlp.fc1, f"{name}.fc1", dtype)
        self.fc2 = DeployedUnit(mlp.fc2, f"{name}.fc2", dtype)
        _of(mlp.fc1.neuron, f"{name}.fc1.neuron")

    @property
    def neuron(self) -> DeployedNeuron | None:
        return self.fc2.neuron

    @property
    def last(self) -> Projection:
        return self.fc2.projection

    def forward(self, x: Tensor, spikes: torch.dtype) -> Tensor:
        assert self.fc1.neuron is not None
        return self.fc1.projection.fire(x, self.fc1.neuron.spec, spikes)


_MIXERS: dict[type[nn.Module], Callable[..., nn.Module]] = {
    QKTokenAttention: _TokenAttention,
    QKChannelAttention: _ChannelAttention,
    SpikingSelfAttention: _SelfAttention,
    SpikingDepthwiseConv: _DepthwiseConv,
}


class DeployedBlock(nn.Module):
    """`SpikingBlock`, in place. Its two branches give the input of their `last` projection, whose spikes are added."""

    def __init__(self, block: SpikingBlock, name: str, dtype: torch.dtype) -> None:
        super().__init__()
        if type(block) is not SpikingBlock:
            raise TypeError(f"{name} is a {type(block).__name__}, expected a SpikingBlock")
        mixer, mlp = block.attn, block.mlp
        if type(mixer) not in _MIXERS:
            known = ", ".join(kind.__name__ for kind in _MIXERS)
            raise TypeError(f"{name}.attn is a {type(mixer).__name__}, of which no deployed form is known: {known}")
        if type(mlp) is not SpikingMlp:
            raise TypeError(f"{name}.mlp is a {type(mlp).__name__}, expected a SpikingMlp")
        self.neuron1 = DeployedNeuron.of(block.neuron1, f"{name}.neuron1")
        self.attn = _MIXERS[type(mixer)](mixer, f"{name}.attn", dtype)
        self.neuron2 = DeployedNeuron.of(block.neuron2, f"{name}.neuron2")
        self.mlp = _Mlp(mlp, f"{name}.mlp", dtype)
        self.widest = max(p.out_channels for p in self.modules() if isinstance(p, Projection))

    def forward(self, x: Tensor, spikes: torch.dtype) -> None:
        T, B, H, W, C = x.shape
        tokens = x.view(T, B, H * W, C)
        if isinstance(self.attn, _TokenAttention):
            for portion in self._portions(tokens):
                self._branch(self.attn, self.neuron1, portion, spikes)
                self._branch(self.mlp, self.neuron2, portion, spikes)
            return
        self._branch(self.attn, self.neuron1, x if isinstance(self.attn, _DepthwiseConv) else tokens, spikes)
        for portion in self._portions(tokens):
            self._branch(self.mlp, self.neuron2, portion, spikes)

    @staticmethod
    def _branch(branch: Any, neuron: DeployedNeuron | None, x: Tensor, spikes: torch.dtype) -> None:
        s = x.contiguous() if neuron is None else ops.fire(x, neuron.spec, spikes)
        _project_and_add(x, branch.last, branch(s, spikes), branch.neuron, branch.batch_coupled)

    def _portions(self, tokens: Tensor) -> Iterator[Tensor]:
        """Views of [T, B, N, C] as [T, 1, n, C], of about the same n."""
        T, B, N, C = tokens.shape
        count = -(-T * B * N * self.widest // PORTION)
        yield from tokens.view(T, 1, B * N, C).tensor_split(count, dim=2)


class DeployedStage(nn.Module):
    """`SpikingStage`: [T, B, H, W, C] to [T, B, H', W', C']."""

    def __init__(self, stage: SpikingStage, name: str, dtype: torch.dtype) -> None:
        super().__init__()
        if type(stage) is not SpikingStage:
            raise TypeError(f"{name} is a {type(stage).__name__}, expected a SpikingStage")
        if type(stage.embed) is not SpikingPatchEmbed:
            raise TypeError(f"{name}.embed is a {type(stage.embed).__name__}, expected a SpikingPatchEmbed")
        blocks: list[Any] = list(stage.blocks)
        self.embed = DeployedEmbed(stage.embed, f"{name}.embed", dtype)
        self.blocks = nn.ModuleList(DeployedBlock(block, f"{name}.blocks.{i}", dtype) for i, block in enumerate(blocks))

    def forward(self, x: Tensor, spikes: torch.dtype, periodic: bool = False) -> Tensor:
        x = self.embed(x, spikes, periodic).contiguous()
        for block in self.blocks:
            block(x, spikes)
        return x

    def largest_sum(self, of_input: int) -> int:
        """The largest sum of spikes that can reach a convolution or leave, for inputs of up to `of_input`."""
        if self.embed.neuron is not None:
            return 1
        added = 1 + (self.embed.shortcut is not None) + 2 * len(self.blocks)
        return max(of_input, added)
