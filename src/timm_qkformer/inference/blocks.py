"""The parts of a deployed model, from stem to last block. Each is built from the part of the model it stands for.

Tensors are channels last, [T, B, H, W, C]. `spikes` is the dtype of spikes and spike sums, and with it the arithmetic
of the convolutions that take them. What shortcuts carry (spike sums, or membrane potentials in a model with membrane
shortcuts) is updated in place; tokens that do not see each other run in chunks that stay in the processor's cache.
"""

from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from ..layers import (
    ConvNorm,
    FeedbackBlock,
    FeedbackStage,
    SpikingBlock,
    SpikingBranch,
    SpikingChain,
    SpikingConv,
    SpikingMlp,
    SpikingPatchEmbed,
    SpikingStage,
    SpikingStem,
)
from ..neurons import SpikingNeuron, membrane_dtype
from ..neurons.state import carried_state
from ..operators import Operator
from . import kernels
from .neurons import DeployedNeuron
from .projection import Projection
from .weights import fold

# Input currents, elements [T, tokens, C], that a chunk of tokens may have in its widest layer: 16 MB in float32.
CHUNK = 2**22


class DeployedUnit(nn.Module):
    """Convolution and neurons (`SpikingConv`, `SpikingStem`), pooling between or behind them if there is any.

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
        self.pool = _pools(unit.pool, f"{name}.pool")
        self.pool_spikes = unit.pool_spikes and _pools(unit.spike_pool, f"{name}.spike_pool")
        self.batch_coupled = unit.batch_coupled

    def forward(self, x: Tensor, spikes: torch.dtype, time_steps: int | None = None, periodic: bool = False) -> Tensor:
        """Spikes [T, B, H', W', C'], or potentials in their own dtype where there are no neurons.

        `time_steps` of an image x [1, B, H, W, C] that is the same at each of them; x may be `periodic` spikes.
        """
        fired = self._fire(x, spikes, time_steps, periodic)
        return kernels.max_pool(fired) if self.pool_spikes else fired

    def _fire(self, x: Tensor, spikes: torch.dtype, time_steps: int | None, periodic: bool) -> Tensor:
        repeats = time_steps if time_steps is not None and x.shape[0] == 1 else 1
        if self.neuron is not None and not self.pool and repeats == 1:
            return self.projection.fire(x, self.neuron.spec, spikes)
        currents = self.projection.currents(x, periodic)
        if self.pool and self.neuron is None:
            currents = kernels.max_pool(currents)
        if repeats > 1:
            currents = currents.expand(repeats, -1, -1, -1, -1)
        if self.neuron is None:
            return currents
        if self.pool:
            return kernels.pool_fire(currents, self.neuron.spec, spikes)
        return kernels.fire(currents, self.neuron.spec, spikes)

    def currents(self, x: Tensor) -> Tensor:
        """Images [T, B, H, W, C] to input currents, pooled if this unit pools."""
        currents = self.projection.currents(x)
        return kernels.max_pool(currents) if self.pool else currents

    def fire(self, currents: Tensor, spikes: torch.dtype) -> Tensor:
        """What `forward` makes of `currents`."""
        if self.neuron is None:
            return currents
        fired = kernels.fire(currents.contiguous(), self.neuron.spec, spikes)
        return kernels.max_pool(fired) if self.pool_spikes else fired

    def fires_periodically(self, steps: int) -> bool:
        """Whether neurons fire at every k-th step, of an input of `steps` steps: where it is one for all."""
        if steps != 1 or self.neuron is None or self.pool_spikes:  # the first of several is not periodic
            return False
        spec = self.neuron.spec
        return spec.levels == "binary" and not spec.soft_reset

    def add_to(self, sums: Tensor, x: Tensor) -> None:
        """Add this unit's spikes (or potentials) for x to `sums`."""
        if self.pool:
            _add(sums, kernels.max_pool(self.projection.currents(x)), self.neuron, self.batch_coupled)
        else:
            _project_and_add(sums, self.projection, x, self.neuron, self.batch_coupled)


def _pools(pool: nn.Module, name: str) -> bool:
    if type(pool) is nn.Identity:
        return False
    if type(pool) is nn.MaxPool2d and (pool.kernel_size, pool.stride, pool.padding) == (3, 2, 1):
        return True
    raise TypeError(f"{name} is {pool}, expected max pooling of 3x3, stride 2, padding 1, or none")


def _is_plain(unit: SpikingConv) -> bool:
    return type(unit.pool) is nn.Identity and not unit.pool_spikes


def _add(sums: Tensor, currents: Tensor, neuron: DeployedNeuron | None, batch_coupled: bool = False) -> None:
    if neuron is None:
        sums.add_(currents)
    elif batch_coupled:  # one sequence, sample after sample within a step
        joined = sums.view(-1, *sums.shape[2:])
        kernels.fire(currents.flatten(0, 1), neuron.spec, sums.dtype, sums=joined, out=joined)
    else:
        kernels.fire(currents, neuron.spec, sums.dtype, sums=sums, out=sums)


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
            x = kernels.fire(x, self.neuron.spec, spikes)
        y = _through(self.main, x, spikes, periodic)
        if self.shortcut is not None:
            self.shortcut.add_to(y, x)
        return y


class DeployedChain(nn.Module):
    """`SpikingChain`: spikes to spikes, spike sums or potentials, potentials to potentials."""

    def __init__(self, chain: SpikingChain, name: str, dtype: torch.dtype) -> None:
        super().__init__()
        units: list[Any] = list(chain.main)
        position: Any = chain.position
        self.neuron = DeployedNeuron.of(chain.neuron, f"{name}.neuron")
        self.main = nn.ModuleList(DeployedUnit(unit, f"{name}.main.{i}", dtype) for i, unit in enumerate(units))
        self.position_input = DeployedNeuron.of(chain.position_input, f"{name}.position_input")
        self.position = DeployedUnit(position, f"{name}.position", dtype) if position is not None else None

    def forward(self, x: Tensor, spikes: torch.dtype, periodic: bool) -> Tensor:
        if self.neuron is not None:
            x = kernels.fire(x, self.neuron.spec, spikes)
        y = _through(self.main, x, spikes, periodic)
        if self.position is not None:
            y = y.contiguous()
            seen = y.clone() if self.position_input is None else kernels.fire(y, self.position_input.spec, spikes)
            self.position.add_to(y, seen)
        return y


def _through(units: nn.ModuleList, x: Tensor, spikes: torch.dtype, periodic: bool) -> Tensor:
    """The convolutions of an embedding, one after the other."""
    for i, unit in enumerate(units):
        x = unit(x, spikes, periodic=periodic and i == 0)
    return x.float() if x.dtype == torch.bfloat16 and unit.neuron is None else x  # potentials add up


class DeployedOperator(nn.Module):
    """An `Operator`: its inputs in one product, `attend` by its kernel or by the operator itself, the last unit.

    Takes spikes [T, B, N, C] (of maps [T, B, H, W, C] without inputs) and gives what the last unit takes. In a block
    with feedback, the inputs that take it have a product of their own.
    """

    def __init__(self, operator: Operator, name: str, dtype: torch.dtype, has_feedback: bool = False) -> None:
        super().__init__()
        if not isinstance(operator, Operator) or not getattr(type(operator).forward, "is_derived", False):
            raise TypeError(
                f"{name} is a {type(operator).__name__}, of which no deployed form is known: it must be an Operator "
                "that declares `attend` and leaves `forward` to its base"
            )
        units = {part: getattr(operator, part) for part in operator.inputs}
        last = getattr(operator, operator.output)
        for part, unit in [*units.items(), *([(operator.output, last)] if units else [])]:
            if type(unit) is not SpikingConv or not _is_plain(unit) or unit.conv.kernel_size != (1, 1):
                raise TypeError(f"{name}.{part} is {unit}, expected a SpikingConv of 1x1 without pooling")
        self.names = operator.inputs
        self.num_heads = operator.num_heads
        self.kernel = operator.native_kernel()
        self.shapes = [operator.input_shape(part) for part in operator.inputs]
        self.takes_maps = not units
        self.runs_in_chunks = operator.tokens_are_independent
        if units:
            folded = [fold(unit, f"{name}.{part}") for part, unit in units.items()]
            plain = len(folded) - (len(operator.fed) if has_feedback else 0)  # those that are fed are the last
            self.inputs: Projection | None = Projection(folded[:plain], 1, 1, dtype)
            self.fed = Projection(folded[plain:], 1, 1, dtype) if has_feedback else None
            self.neurons: Any = nn.ModuleList(_of(unit.neuron, f"{name}.{part}.neuron") for part, unit in units.items())
            self.core: Any = _core(operator, operator.inner_modules(), name)
            self.inner = list(operator.inner_neurons)
        else:
            self.inputs = None
        deployed = DeployedUnit(last, f"{name}.{operator.output}", dtype)
        setattr(self, operator.output, deployed.projection if units else deployed)
        self.output = operator.output
        self.neuron = deployed.neuron
        self.batch_coupled = last.batch_coupled

    @property
    def last(self) -> Projection:
        """The convolution behind the attention."""
        unit = getattr(self, self.output)
        projection: Projection = unit.projection if isinstance(unit, DeployedUnit) else unit
        return projection

    def forward(self, x: Tensor, spikes: torch.dtype, size: tuple[int, int], feedback: Tensor | None = None) -> Tensor:
        """Of maps of this size."""
        if self.inputs is None:
            return x
        currents = self.inputs.currents(x)
        if self.fed is not None:
            fed = self.fed.currents(x if feedback is None else x + feedback)
            currents = torch.cat([currents, fed], dim=-1)
        if self.kernel is not None:
            neurons = [neuron.spec for neuron in (*self.neurons, *(getattr(self.core, name) for name in self.inner))]
            found = kernels.operator_kernel(self.kernel, currents, len(self.names), self.num_heads, neurons, spikes)
            if found is not None:
                return found
        dtype = membrane_dtype(currents)  # counts are beyond half precision
        inputs = []
        parts = currents.split([heads * head_dim for heads, head_dim in self.shapes], dim=-1)
        for part, neuron, shape in zip(parts, self.neurons, self.shapes, strict=True):
            fired = kernels.fire(part.contiguous(), neuron.spec, dtype)
            inputs.append(fired.unflatten(-1, shape).permute(0, 1, 3, 4, 2))
        attended: Tensor = self.core.attend(*inputs, *self.core.map_size(*size))  # [T, B, heads, channels of a head, N]
        return attended.permute(0, 1, 4, 2, 3).flatten(3).to(spikes).contiguous()

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any, **kwargs: Any) -> None:
        # Before operators were declared in one place, inner neurons stood behind those of the inputs.
        for i, name in enumerate(self.inner if self.inputs is not None else ()):
            old = f"{prefix}neurons.{len(self.names) + i}.leak"
            if old in state_dict:
                state_dict[f"{prefix}core.{name}.leak"] = state_dict.pop(old)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


def _core(part: nn.Module, inner: Mapping[str, nn.Module], name: str) -> nn.Module:
    """An operator or MLP without its projections, its own neurons deployed: what `attend` or `mix` needs."""
    core = part.__new__(type(part))
    core.__dict__ = {**part.__dict__, "_modules": {}}
    for child, module in inner.items():
        copied = DeployedNeuron(module, f"{name}.{child}") if isinstance(module, SpikingNeuron) else deepcopy(module)
        core.add_module(child, copied)
    for parameter in ("_parameters", "_buffers"):
        core.__dict__[parameter] = deepcopy(part.__dict__[parameter])
    return core.eval()


def _of(neuron: nn.Module, name: str) -> DeployedNeuron:
    deployed = DeployedNeuron.of(neuron, name)
    if deployed is None:
        raise TypeError(f"{name} is nn.Identity, expected neurons")
    return deployed


class _Mlp(nn.Module):
    """Spikes [T, B, N, C] to what the last layer takes, [T, B, N, C']: what the hidden layer fires, mixed perhaps."""

    batch_coupled = False
    takes_maps = False

    def __init__(self, mlp: nn.Module, name: str, dtype: torch.dtype) -> None:
        super().__init__()
        if not isinstance(mlp, SpikingMlp) or type(mlp).forward is not SpikingMlp.forward:
            raise TypeError(
                f"{name} is a {type(mlp).__name__}, expected a SpikingMlp, or one that declares `mix` and leaves "
                "`forward` to its base"
            )
        self.runs_in_chunks = not mlp.mixes
        inner = {child: part for child, part in mlp.named_children() if child not in ("fc1", "fc2", "drop")}
        self.full = torch.promote_types(mlp.fc1.conv.weight.dtype, torch.float32)  # what is mixed in
        self.core: Any = _core(mlp, inner, name).to(self.full) if mlp.mixes else None
        self.fc1 = DeployedUnit(mlp.fc1, f"{name}.fc1", dtype)
        self.fc2 = DeployedUnit(mlp.fc2, f"{name}.fc2", dtype)
        _of(mlp.fc1.neuron, f"{name}.fc1.neuron")

    @property
    def neuron(self) -> DeployedNeuron | None:
        return self.fc2.neuron

    @property
    def last(self) -> Projection:
        return self.fc2.projection

    def forward(self, x: Tensor, spikes: torch.dtype, size: tuple[int, int]) -> Tensor:
        assert self.fc1.neuron is not None
        if self.core is None:
            return self.fc1.projection.fire(x, self.fc1.neuron.spec, spikes)
        currents = self.fc1.projection.currents(x)
        hidden = kernels.fire(currents, self.fc1.neuron.spec, self.full)
        mixed: Tensor = self.core.mix(hidden.unflatten(2, size).permute(0, 1, 4, 2, 3))
        return mixed.permute(0, 1, 3, 4, 2).flatten(2, 3).to(spikes).contiguous()


class _Branch(nn.Module):
    """`SpikingBranch`: a further operator and its neuron."""

    def __init__(self, branch: nn.Module, name: str, dtype: torch.dtype) -> None:
        super().__init__()
        if type(branch) is not SpikingBranch:
            raise TypeError(f"{name} is a {type(branch).__name__}, expected a SpikingBranch")
        mixer: Any = branch.mixer
        self.neuron = DeployedNeuron.of(branch.neuron, f"{name}.neuron")
        self.mixer = DeployedOperator(mixer, f"{name}.mixer", dtype)


class DeployedBlock(nn.Module):
    """`SpikingBlock`, in place. Its branches give the input of their `last` projection, whose spikes are added."""

    def __init__(self, block: SpikingBlock, name: str, dtype: torch.dtype) -> None:
        super().__init__()
        if type(block) not in (SpikingBlock, FeedbackBlock):
            raise TypeError(f"{name} is a {type(block).__name__}, expected a SpikingBlock")
        mixer: Any = block.attn
        self.neuron1 = DeployedNeuron.of(block.neuron1, f"{name}.neuron1")
        self.attn = DeployedOperator(mixer, f"{name}.attn", dtype, type(block) is FeedbackBlock)
        self.more = nn.ModuleList(_Branch(branch, f"{name}.more.{i}", dtype) for i, branch in enumerate(block.more))
        self.neuron2 = DeployedNeuron.of(block.neuron2, f"{name}.neuron2")
        self.mlp = _Mlp(block.mlp, f"{name}.mlp", dtype)
        self.widest = max(p.out_channels for p in self.modules() if isinstance(p, Projection))

    def forward(self, x: Tensor, spikes: torch.dtype, feedback: Tensor | None = None) -> None:
        more: list[Any] = list(self.more)
        branches: list[tuple[DeployedNeuron | None, Any]] = [
            (self.neuron1, self.attn),
            *((branch.neuron, branch.mixer) for branch in more),
            (self.neuron2, self.mlp),
        ]
        tokens, size = x.flatten(2, 3), (x.shape[2], x.shape[3])
        if feedback is not None:  # of the first branch, in one piece
            _, attn = branches.pop(0)
            fired = tokens.contiguous() if self.neuron1 is None else kernels.fire(tokens, self.neuron1.spec, spikes)
            given = attn(fired, spikes, size, feedback.flatten(2, 3))
            _project_and_add(tokens, attn.last, given, attn.neuron, attn.batch_coupled)
        while branches:
            together = next((i for i, (_, b) in enumerate(branches) if not b.runs_in_chunks), len(branches))
            if together > 0:
                for chunk in self._chunks(tokens):
                    for neuron, branch in branches[:together]:
                        self._run(neuron, branch, chunk, spikes, size)
            else:
                together = 1
                neuron, branch = branches[0]
                self._run(neuron, branch, x if branch.takes_maps else tokens, spikes, size)
            branches = branches[together:]

    @staticmethod
    def _run(neuron: DeployedNeuron | None, branch: Any, x: Tensor, spikes: torch.dtype, size: tuple[int, int]) -> None:
        s = x.contiguous() if neuron is None else kernels.fire(x, neuron.spec, spikes)
        _project_and_add(x, branch.last, branch(s, spikes, size), branch.neuron, branch.batch_coupled)

    def _chunks(self, tokens: Tensor) -> Iterator[Tensor]:
        """Views of [T, B, N, C] as [T, 1, n, C], of about the same n; where a state is carried, samples stay apart."""
        if carried_state() is not None:
            yield tokens
            return
        T, B, N, C = tokens.shape
        count = -(-T * B * N * self.widest // CHUNK)
        yield from tokens.view(T, 1, B * N, C).tensor_split(count, dim=2)


class DeployedStage(nn.Module):
    """`SpikingStage`: [T, B, H, W, C] to [T, B, H', W', C']."""

    def __init__(self, stage: SpikingStage, name: str, dtype: torch.dtype) -> None:
        super().__init__()
        if type(stage) not in (SpikingStage, FeedbackStage):
            raise TypeError(f"{name} is a {type(stage).__name__}, expected a SpikingStage")
        embeds: dict[type, Any] = {SpikingPatchEmbed: DeployedEmbed, SpikingChain: DeployedChain}
        if type(stage.embed) not in embeds:
            expected = "a SpikingPatchEmbed or SpikingChain"
            raise TypeError(f"{name}.embed is a {type(stage.embed).__name__}, expected {expected}")
        blocks: Sequence[Any] = list(stage.blocks)
        self.embed = embeds[type(stage.embed)](stage.embed, f"{name}.embed", dtype)
        self.blocks = nn.ModuleList(DeployedBlock(block, f"{name}.blocks.{i}", dtype) for i, block in enumerate(blocks))

    def forward(self, x: Tensor, spikes: torch.dtype, periodic: bool = False) -> Tensor:
        x = self.embed(x, spikes, periodic).contiguous()
        for block in self.blocks:
            block(x, spikes)
        return x
