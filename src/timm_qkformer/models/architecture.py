"""What a model is made of, as a value: `Architecture`.

Any number of stages, each an embedding and a list of blocks, each block a list of token mixers with their heads, and an
MLP. Papers' files say how their arguments become one, most of them through `hierarchy` (several resolutions) or `flat`
(one).
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from math import prod
from typing import Any, List, NamedTuple, Optional, Tuple, Union

from ..errors import is_number
from ..layers import FeedbackSpec, PositionSpec, UnitSpec, get_mlp
from ..operators import get_operator

# Files and command lines may ask for more than can ever be built; without a limit the machine would try.
MAX_BLOCKS = 1000


class EmbedSpec(NamedTuple):
    """A `SpikingPatchEmbed`: which of its convolutions halve the size, and what lies between and beside them."""

    pools: Tuple[bool, ...]
    hidden_ratio: float = 1.0
    shortcut: bool = True
    strided: bool = False
    pool_shortcut: bool = False

    @property
    def stride(self) -> int:
        """Stride of the whole embedding."""
        return int(2 ** sum(self.pools))


class ChainSpec(NamedTuple):
    """A `SpikingChain`: its convolutions, what is added to the tokens, whether neurons come before all."""

    units: Tuple[UnitSpec, ...]
    position: Optional[PositionSpec] = None
    fires_before: bool = False

    @property
    def stride(self) -> int:
        """Stride of the whole chain."""
        return prod(unit.reduction for unit in self.units)


class MixerSpec(NamedTuple):
    """A token mixer: name of a registered operator, heads, further arguments of the operator."""

    operator: str
    num_heads: int = 8
    options: Mapping[str, Any] = {}


class BlockSpec(NamedTuple):
    """A block: its token mixers, added one after the other, the MLP's width relative to the stage's, and its kind."""

    mixers: Tuple[MixerSpec, ...]
    mlp_ratio: float = 4.0
    mlp: str = "mlp"


class StageSpec(NamedTuple):
    """A stage: its width, embedding and blocks."""

    dim: int
    embed: Union[EmbedSpec, ChainSpec]
    blocks: Tuple[BlockSpec, ...]


class Architecture(NamedTuple):
    """What a model is made of.

    Attributes:
        stem, stages: Its parts, in their order.
        membrane_shortcut: Whether blocks add up membrane potentials instead of spikes.
        membrane_readout: Whether neurons stand in front of the classifier, see `MembraneReadout`.
        feedback: How the last stage feeds back to itself, if it does.
    """

    stem: UnitSpec
    stages: Tuple[StageSpec, ...]
    membrane_shortcut: bool = False
    membrane_readout: bool = False
    feedback: Optional[FeedbackSpec] = None


class Embedding(NamedTuple):
    """How a hierarchical model goes from pixels to tokens; its stem has `stem_ratio` of the first stage's width.

    With `plain` its convolutions are as those of Spikformer's SPS: without shortcuts, and pooled after the neurons.
    """

    stem_pool: bool
    stages: Tuple[EmbedSpec, ...]
    stem_stride: int = 1
    plain: bool = False
    stem_ratio: float = 0.5

    @property
    def stride(self) -> int:
        """Stride of the whole embedding."""
        return self.stem_stride * (1 + self.stem_pool) * prod(stage.stride for stage in self.stages)


def hierarchy(
    embedding: Embedding,
    embed_dims: Sequence[int],
    depths: Sequence[int],
    num_heads: Any,
    mlp_ratio: Any,
    operators: Tuple[str, Any],
    options: Mapping[str, Any],
    membrane_shortcut: bool,
) -> Architecture:
    """The architecture of a hierarchical model (HST) from the arguments that its paper gives by stage.

    Args:
        embedding: Downsampling, one entry for each stage.
        embed_dims: Width of each stage.
        depths: Blocks in each stage.
        num_heads: Heads; one number, one per stage, or for a stage one per block.
        mlp_ratio: MLP width relative to the stage's, likewise.
        operators: Name of the argument, for errors, and names of token mixers, likewise; "a+b" is a block of two.
        options: Further arguments of all operators.
        membrane_shortcut: See `Architecture`.

    Raises:
        ValueError: For an argument outside its range.
    """
    widths = _per_stage("embed_dims", embed_dims, len(embedding.stages), minimum=2)
    blocks = _blocks(widths, depths, num_heads, mlp_ratio, operators, lambda name: options)
    embeds: List[Union[EmbedSpec, ChainSpec]] = list(embedding.stages)
    if embedding.plain:
        embeds = [_chain(*each, membrane_shortcut) for each in zip(embedding.stages, widths, strict=True)]
    stages = tuple(map(StageSpec, widths, embeds, blocks))
    fires = not membrane_shortcut
    where = _plain_pool(fires) if embedding.plain else "currents"
    stem_dim = int(widths[0] * embedding.stem_ratio)
    stem = UnitSpec(stem_dim, where if embedding.stem_pool else "", fires, embedding.stem_stride)
    return Architecture(stem, stages, membrane_shortcut, membrane_shortcut)


def _chain(embed: EmbedSpec, width: int, membrane_shortcut: bool) -> ChainSpec:
    """A stage's convolutions without the shortcut, pooled after the neurons; with membrane shortcuts there are neurons
    before all in place of those behind the last."""
    *first, last = embed.pools
    units = [UnitSpec(int(width * embed.hidden_ratio), "spikes" if pool else "") for pool in first]
    units.append(UnitSpec(width, _plain_pool(not membrane_shortcut) if last else "", not membrane_shortcut))
    return ChainSpec(tuple(units), fires_before=membrane_shortcut)


def _plain_pool(fires: bool) -> str:
    """Where a unit of SPS pools: what it fires, if it does."""
    return "spikes" if fires else "currents"


def flat(
    units: Sequence[UnitSpec],
    position: Optional[PositionSpec],
    depth: int,
    num_heads: Any,
    mlp_ratio: Any,
    operators: Tuple[str, Any],
    options: Mapping[str, Mapping[str, Any]],
    membrane_shortcut: bool = False,
    membrane_readout: bool = False,
    mlp: str = "mlp",
) -> Architecture:
    """The architecture of a transformer of one resolution, from the arguments that its paper gives.

    Args:
        units: Its convolutions, from pixels on; the last one's channels are the width.
        position: What is added to the tokens.
        depth: Blocks.
        num_heads: Heads; one number, or one per block.
        mlp_ratio: MLP width relative to the model's, likewise.
        operators: Name of the argument, for errors, and names of token mixers, likewise; "a+b" is a block of two.
        options: Further arguments of operators: under "" of all, else by the name of the operator.
        membrane_shortcut, membrane_readout: See `Architecture`.
        mlp: Kind of MLP.

    Raises:
        ValueError: For an argument outside its range.
    """
    first, *others = units
    width = units[-1].dim
    if any(unit.dim < 1 for unit in units):
        raise ValueError(f"embed_dim={width!r} leaves convolutions without channels: {[unit.dim for unit in units]}")

    def options_of(name: str) -> Mapping[str, Any]:
        return {**options.get("", {}), **options.get(name.lower(), {})}

    def of_stage(value: Any) -> Any:
        return [value] if _is_row(value) else value

    values = (of_stage(num_heads), of_stage(mlp_ratio), (operators[0], of_stage(operators[1])))
    (blocks,) = _blocks([width], [depth], *values, options_of, depth_name="depth", mlp=mlp)
    stage = StageSpec(width, ChainSpec(tuple(others), position), blocks)
    return Architecture(first, (stage,), membrane_shortcut, membrane_readout)


def _blocks(
    widths: Sequence[int],
    depths: Sequence[int],
    num_heads: Any,
    mlp_ratio: Any,
    operators: Tuple[str, Any],
    options_of: Callable[[str], Mapping[str, Any]],
    depth_name: str = "depths",
    mlp: str = "mlp",
) -> List[Tuple[BlockSpec, ...]]:
    """The blocks of each stage; see `hierarchy`."""
    counts = _per_stage(depth_name, depths, len(widths), minimum=0)
    if sum(counts) > MAX_BLOCKS:
        raise ValueError(f"{depth_name}={depths!r}: at most {MAX_BLOCKS:,} blocks can be built")
    heads = _per_block("num_heads", num_heads, counts)
    ratios = _per_block("mlp_ratio", mlp_ratio, counts)
    names = _per_block(operators[0], operators[1], counts)
    parts = get_mlp(mlp).parts
    if any(type(h) is not int or h < 1 for of_stage in heads for h in of_stage):
        raise ValueError(f"num_heads={num_heads!r} must be whole numbers, none of them below 1")
    for width, of_stage in zip(widths, ratios, strict=True):
        if not all(is_number(r) and 1 <= width * r < 2**31 for r in of_stage):
            raise ValueError(f"mlp_ratio={mlp_ratio!r} leaves no MLP of 1 to 2**31 channels, embed_dims={widths!r}")
        if odd := [int(width * r) for r in of_stage if int(width * r) % parts]:
            raise ValueError(
                f"mlp_ratio={mlp_ratio!r} gives an MLP of {odd[0]} hidden channels, embed_dims={widths!r}: they are "
                f"split into {parts} equal parts"
            )
    stages = []
    for i in range(len(widths)):
        blocks = []
        for name, h, ratio in zip(names[i], heads[i], ratios[i], strict=True):
            try:
                names_of_block = name.split("+") if isinstance(name, str) else [name]
                for part in names_of_block:
                    get_operator(part)
            except ValueError as error:
                raise ValueError(f"{operators[0]}={operators[1]!r}: {error}") from error
            mixers = tuple(MixerSpec(part, h, options_of(part)) for part in names_of_block)
            blocks.append(BlockSpec(mixers, ratio, mlp))
        stages.append(tuple(blocks))
    return stages


def with_operator_args(architecture: Architecture, operator_args: Any) -> Architecture:
    """The architecture whose operators have further arguments, by their registered names; these override its own.

    Raises:
        ValueError: For names of no operator, anything else than arguments by their names below one, or arguments that
            are not the operator's to choose.
    """
    options = _operator_options("operator_args", operator_args)

    def of_mixer(mixer: MixerSpec) -> MixerSpec:
        return mixer._replace(options={**mixer.options, **options.get(mixer.operator.lower(), {})})

    def of_block(block: BlockSpec) -> BlockSpec:
        return block._replace(mixers=tuple(map(of_mixer, block.mixers)))

    stages = tuple(stage._replace(blocks=tuple(map(of_block, stage.blocks))) for stage in architecture.stages)
    return architecture._replace(stages=stages)


# What models and their blocks tell operators, and the models' arguments for it, if there are any.
_SET_BY_MODELS: Mapping[str, Optional[str]] = {
    "num_heads": "num_heads",
    "proj_drop": "proj_drop_rate",
    "neuron_layer": "neuron",
    "device": "device",
    "dtype": "dtype",
    **dict.fromkeys(("dim", "membrane_shortcut", "input_range")),
}


def _operator_options(name: str, value: Any) -> dict[str, Mapping[str, Any]]:
    if not isinstance(value, Mapping) or not all(isinstance(args, Mapping) for args in value.values()):
        raise ValueError(f"{name}={value!r} must be a mapping of operators' names to arguments by their names")
    options: dict[str, Mapping[str, Any]] = {}
    for operator, args in value.items():
        try:
            get_operator(operator)
        except ValueError as error:
            raise ValueError(f"{name}={value!r}: {error}") from error
        if taken := [arg for arg in args if arg in _SET_BY_MODELS]:
            own = _SET_BY_MODELS[taken[0]]
            instead = f"give {own}= to the model" if own else "leave it out"
            raise ValueError(f"{name}={value!r}: the model itself sets {taken[0]!r} of its operators: {instead}")
        options[operator.lower()] = {**options.get(operator.lower(), {}), **args}
    return options


def _is_row(value: Any) -> bool:
    """Whether an argument is a row of values and not one for all."""
    return isinstance(value, Iterable) and not isinstance(value, (str, bytes))


def _per_stage(name: str, value: Any, count: int, minimum: Optional[int] = None) -> List[Any]:
    """One value per stage, from one for all or a sequence."""
    values: List[Any] = list(value) if _is_row(value) else [value] * count
    if len(values) != count:
        raise ValueError(f"{name}={value!r} must have one entry for each of the {count} stages, not {len(values)}")
    if minimum is not None and any(type(v) is not int or v < minimum for v in values):
        raise ValueError(f"{name}={value!r} must be whole numbers, none of them below {minimum}")
    return values


def _per_block(name: str, value: Any, depths: Sequence[int]) -> List[List[Any]]:
    """One value per block of each stage, from one for all, one per stage, or for a stage one per block."""
    values = []
    for of_stage, depth in zip(_per_stage(name, value, len(depths)), depths, strict=True):
        of_blocks = list(of_stage) if _is_row(of_stage) else [of_stage] * depth
        if len(of_blocks) != depth:
            raise ValueError(
                f"{name}={value!r}: {of_stage!r} must have one entry for each of the stage's {depth} blocks"
            )
        values.append(of_blocks)
    return values
