"""The base of all models: a stem, stages of blocks, a readout and a classifier, with timm's interface to them.

What a model is made of is a value, `Architecture`: any number of stages, each an embedding and a list of blocks, each
block a list of token mixers with their heads and an MLP ratio. Papers' files say how their arguments become one.
Tensors are [T, B, C, H, W] from the stem to the readout that ends `forward_features`.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, List, NamedTuple, Optional, Set, Tuple, Union

import torch
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import SelectAdaptivePool2d, calculate_drop_path_rates, get_device_dtype, trunc_normal_
from timm.models._features import feature_take_indices
from timm.models._input import update_model_args
from torch import Tensor, nn

from ..layers import (
    MeanReadout,
    MembraneReadout,
    SpikingBlock,
    SpikingPatchEmbed,
    SpikingStage,
    SpikingStem,
)
from ..neurons import NeuronLayer, get_neuron_layer
from ..operators import get_operator

# The pretrained config that ImageNet models share. Both releases evaluate with Resize(256), CenterCrop(224), bicubic.
IMAGENET_CFG: dict[str, Any] = {
    "num_classes": 1000,
    "input_size": (3, 224, 224),
    "pool_size": (14, 14),
    "crop_pct": 0.875,
    "interpolation": "bicubic",
    "mean": IMAGENET_DEFAULT_MEAN,
    "std": IMAGENET_DEFAULT_STD,
    "first_conv": "stem.conv",
    "classifier": "head",
}


# Files and command lines may ask for more than can ever be built; without a limit the machine would try.
MAX_BLOCKS = 1000
MAX_TIME_STEPS = 10_000


class StemSpec(NamedTuple):
    """The first convolution: its channels, and whether it halves the size by pooling or by stride."""

    dim: int
    pool: bool = False
    stride: int = 1


class EmbedSpec(NamedTuple):
    """One stage's patch embedding: which of its convolutions halve the size, and what lies between and beside them."""

    pools: Tuple[bool, ...]
    hidden_ratio: float = 1.0
    shortcut: bool = True
    strided: bool = False
    pool_shortcut: bool = False


class MixerSpec(NamedTuple):
    """A token mixer: name of a registered operator, heads, further arguments of the operator."""

    operator: str
    num_heads: int = 8
    options: Mapping[str, Any] = {}


class BlockSpec(NamedTuple):
    """A block: its token mixers, added one after the other, and the MLP's width relative to the stage's."""

    mixers: Tuple[MixerSpec, ...]
    mlp_ratio: float = 4.0


class StageSpec(NamedTuple):
    """A stage: its width, embedding and blocks."""

    dim: int
    embed: EmbedSpec
    blocks: Tuple[BlockSpec, ...]


class Architecture(NamedTuple):
    """What a model is made of; `membrane_shortcut`: whether membrane potentials are added up instead of spikes."""

    stem: StemSpec
    stages: Tuple[StageSpec, ...]
    membrane_shortcut: bool = False


class Embedding(NamedTuple):
    """How a hierarchical model goes from pixels to tokens; its stem has half the first stage's width."""

    stem_pool: bool
    stages: Tuple[EmbedSpec, ...]
    stem_stride: int = 1


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
    count = len(embedding.stages)
    widths = _per_stage("embed_dims", embed_dims, count, minimum=2)
    blocks = _per_stage("depths", depths, count, minimum=0)
    if sum(blocks) > MAX_BLOCKS:
        raise ValueError(f"depths={depths!r} are {sum(blocks):,} blocks, at most {MAX_BLOCKS:,} can be built")
    heads = _per_block("num_heads", num_heads, blocks)
    ratios = _per_block("mlp_ratio", mlp_ratio, blocks)
    names = _per_block(operators[0], operators[1], blocks)
    if any(type(h) is not int or h < 1 for of_stage in heads for h in of_stage):
        raise ValueError(f"num_heads={num_heads!r} must be whole numbers, none of them below 1")
    for width, of_stage in zip(widths, ratios, strict=True):
        if any(isinstance(r, str) or not 1 <= width * r < 2**31 for r in of_stage):
            raise ValueError(f"mlp_ratio={mlp_ratio!r} leaves no MLP of 1 to 2**31 channels, embed_dims={embed_dims!r}")
    stages = []
    for i, (width, embed) in enumerate(zip(widths, embedding.stages, strict=True)):
        of_stage = []
        for name, h, ratio in zip(names[i], heads[i], ratios[i], strict=True):
            try:
                mixers = tuple(MixerSpec(part, h, options) for part in name.split("+"))
                for mixer in mixers:
                    get_operator(mixer.operator)
            except (ValueError, AttributeError) as error:
                raise ValueError(f"{operators[0]}={operators[1]!r}: {error}") from error
            of_stage.append(BlockSpec(mixers, ratio))
        stages.append(StageSpec(width, embed, tuple(of_stage)))
    stem = StemSpec(widths[0] // 2, embedding.stem_pool, embedding.stem_stride)
    return Architecture(stem, tuple(stages), membrane_shortcut)


def _per_stage(name: str, value: Any, count: int, minimum: Optional[int] = None) -> List[Any]:
    """One value per stage, from one for all or a sequence."""
    values: List[Any] = [value] * count if isinstance(value, (int, float, str)) else list(value)
    if len(values) != count:
        raise ValueError(f"{name}={value!r} must have one entry for each of the {count} stages, not {len(values)}")
    if minimum is not None and any(type(v) is not int or v < minimum for v in values):
        raise ValueError(f"{name}={value!r} must be whole numbers, none of them below {minimum}")
    return values


def _per_block(name: str, value: Any, depths: Sequence[int]) -> List[List[Any]]:
    """One value per block of each stage, from one for all, one per stage, or for a stage one per block."""
    values = []
    for of_stage, depth in zip(_per_stage(name, value, len(depths)), depths, strict=True):
        of_blocks = [of_stage] * depth if isinstance(of_stage, (int, float, str)) else list(of_stage)
        if len(of_blocks) != depth:
            raise ValueError(
                f"{name}={value!r}: {of_stage!r} must have one entry for each of the stage's {depth} blocks"
            )
        values.append(of_blocks)
    return values


class SpikingTransformer(nn.Module):
    """Stem, stages, readout and classifier, with timm's model interface. Papers' models derive from it.

    Takes images [B, C, H, W], shown for `time_steps` steps, or event clips [B, T, C, H, W], which bring their own T.
    Each forward pass starts from rest, and no sample sees its batch mates.

    Args:
        architecture: What the model is made of.
        in_chans: Input channels.
        num_classes: Classes; 0 for no classifier.
        global_pool: timm's pooling of the feature map before the classifier ("avg", "max", "avgmax", "catavgmax" or
            "" for none).
        time_steps: Time steps T that a static image is shown for.
        neuron: A registered name ("lif", "if", "plif", ...), or a neuron layer such as
            `functools.partial(LIF, surrogate="atan")`.
        neuron_args: Arguments of all neuron layers, such as {"v_threshold": 0.5, "surrogate": "atan"}. The neurons
            after attention keep their threshold of 0.5.
        drop_rate: Dropout before the classifier.
        proj_drop_rate: Dropout after every token mixer and MLP, one mask for all time steps.
        drop_path_rate: Stochastic depth of the last block, rising linearly from 0, one mask for all time steps.

    Raises:
        ValueError: For an argument outside its range.
    """

    def __init__(
        self,
        architecture: Architecture,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        time_steps: int = 4,
        neuron: Union[str, NeuronLayer] = "lif",
        neuron_args: Optional[Mapping[str, Any]] = None,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        rates = {"drop_rate": drop_rate, "proj_drop_rate": proj_drop_rate, "drop_path_rate": drop_path_rate}
        for name, rate in rates.items():
            if not 0.0 <= rate <= 1.0:
                raise ValueError(f"{name}={rate!r} must be a probability, between 0 and 1")
        if not architecture.stages:
            raise ValueError("architecture has no stages: give at least one")
        neuron_layer = get_neuron_layer(neuron, neuron_args)
        self.in_chans = in_chans
        self.num_classes = num_classes
        self.drop_rate = drop_rate
        self.set_time_steps(time_steps)

        stem, membrane_shortcut = architecture.stem, architecture.membrane_shortcut
        args: dict[str, Any] = {"neuron_layer": neuron_layer, "membrane_shortcut": membrane_shortcut, **dd}
        reductions = [2**stem.pool * stem.stride]
        for spec in architecture.stages:
            reductions.append(reductions[-1] * 2 ** sum(spec.embed.pools))
        self.stem = SpikingStem(
            in_chans,
            stem.dim,
            pool=stem.pool,
            stride=stem.stride,
            min_size=reductions[-1],
            neuron_layer=nn.Identity if membrane_shortcut else neuron_layer,
            **dd,
        )
        depths = [len(spec.blocks) for spec in architecture.stages]
        drop_paths: List[List[float]] = calculate_drop_path_rates(drop_path_rate, depths, stagewise=True)
        stages = []
        self.feature_info = []
        chs, numbers = stem.dim, self.stem.output_range
        for i, spec in enumerate(architecture.stages):
            hidden = int(spec.dim * spec.embed.hidden_ratio)
            embed = SpikingPatchEmbed(
                chs,
                spec.dim,
                spec.embed.pools,
                hidden,
                spec.embed.shortcut,
                spec.embed.strided,
                spec.embed.pool_shortcut,
                input_range=numbers,
                **args,
            )
            chs, numbers = spec.dim, embed.output_range
            blocks = []
            for block, rate in zip(spec.blocks, drop_paths[i], strict=True):
                mixers = [partial(get_operator(m.operator), num_heads=m.num_heads, **m.options) for m in block.mixers]
                blocks.append(
                    SpikingBlock(chs, mixers, block.mlp_ratio, proj_drop_rate, rate, input_range=numbers, **args)
                )
                numbers = blocks[-1].output_range
            stages.append(SpikingStage(embed, blocks))
            self.feature_info.append({"num_chs": chs, "reduction": reductions[i + 1], "module": f"stages.{i}"})
        self.stages = nn.Sequential(*stages)
        self.readout: nn.Module = MembraneReadout(neuron_layer, **dd) if membrane_shortcut else MeanReadout()

        self.num_features = self.head_hidden_size = chs
        self._create_head(global_pool, **dd)

    def _create_head(self, global_pool: str, device: Any, dtype: Any) -> None:
        if not isinstance(global_pool, str):
            raise ValueError(f"global_pool={global_pool!r} must be the name of a pooling, such as 'avg', or ''")
        self.global_pool = SelectAdaptivePool2d(pool_type=global_pool, flatten=bool(global_pool))
        self.head_hidden_size = self.num_features * self.global_pool.feat_mult()
        if self.num_classes > 0:
            head = nn.Linear(self.head_hidden_size, self.num_classes, device=device, dtype=dtype)
            trunc_normal_(head.weight, std=0.02)
            nn.init.zeros_(head.bias)
            self.head: nn.Module = head
        else:
            self.head = nn.Identity()

    @torch.jit.ignore
    def set_time_steps(self, time_steps: int) -> None:
        """Show static images for this many time steps from now on; the weights do not depend on it."""
        if isinstance(time_steps, bool) or not isinstance(time_steps, int) or time_steps < 1:
            raise ValueError(f"time_steps={time_steps!r} must be an integer of at least 1")
        if time_steps > MAX_TIME_STEPS:
            raise ValueError(f"time_steps={time_steps!r} must be at most {MAX_TIME_STEPS:,}")
        self.time_steps = time_steps
        update_model_args(self, time_steps=time_steps)  # so that timm saves it with the model

    @torch.jit.ignore
    def no_weight_decay(self) -> Set[str]:
        return set()

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        return {
            "stem": r"^stem",
            "blocks": r"^stages\.(\d+)"
            if coarse
            else [
                (r"^stages\.(\d+)\.embed", (0,)),
                (r"^stages\.(\d+)\.blocks\.(\d+)", None),
            ],
        }

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keep the embeddings' and blocks' inputs alone and compute the rest again in the backward pass.

        Gradients, running statistics and batch counts are those without checkpointing.
        """
        for stage in self.stages:
            assert isinstance(stage, SpikingStage)
            stage.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        return self.head

    @torch.jit.ignore
    def reset_classifier(self, num_classes: int, global_pool: Optional[str] = None) -> None:
        self.num_classes = num_classes
        pool = self.global_pool.pool_type if global_pool is None else global_pool
        self._create_head(pool, **get_device_dtype(self))
        self.global_pool.train(self.training)
        self.head.train(self.training)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: Optional[Union[int, List[int]]] = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Union[List[Tensor], Tuple[Tensor, List[Tensor]]]:
        """Forward features that also returns the stages' maps [B, C, H, W], plain means over T.

        The first result is what `forward_features` gives or, if that took fewer stages, the last stage's mean over T.

        Args:
            x: Images [B, C, H, W] or event clips [B, T, C, H, W].
            indices: Take the last n stages if int, all if None, the given ones if a sequence.
            norm: There is no norm to apply; accepted for timm's interface.
            stop_early: Stop after the last stage that is asked for.
            output_fmt: "NCHW".
            intermediates_only: Return the list of maps alone.
        """
        assert output_fmt in ("NCHW",), "Output shape must be NCHW."
        intermediates = []
        take_indices, max_index = feature_take_indices(len(self.stages), indices)
        if torch.jit.is_scripting() or not stop_early:  # can't slice stages in torchscript
            stages = self.stages
        else:
            stages = self.stages[: max_index + 1]

        x = self.stem(x, self.time_steps)
        for feat_idx, stage in enumerate(stages):
            x = stage(x)
            if feat_idx in take_indices:
                intermediates.append(x.mean(0))

        if intermediates_only:
            return intermediates
        last = self.readout(x) if len(stages) == len(self.stages) else x.mean(0)
        return last, intermediates

    def prune_intermediate_layers(
        self,
        indices: Union[int, List[int]] = 1,
        prune_norm: bool = False,
        prune_head: bool = True,
    ) -> List[int]:
        """Remove the stages, and with them the head, that the given intermediates do not need.

        The neurons in front of a membrane-shortcut model's head go, too: `forward_features` is then the mean over T.
        """
        take_indices, max_index = feature_take_indices(len(self.stages), indices)
        prune_end = max_index < len(self.stages) - 1
        self.stages = self.stages[: max_index + 1]
        if prune_end:
            self.num_features = self.head_hidden_size = self.feature_info[max_index]["num_chs"]
        if prune_head or prune_end:
            self.reset_classifier(0, "")
            self.readout = MeanReadout()
        return take_indices

    def forward_features(self, x: Tensor) -> Tensor:
        """Images [B, C, H, W] or event clips [B, T, C, H, W] to a feature map [B, C', H', W'].

        Without membrane shortcuts it is the firing-rate map, the last stage's spike sums averaged over T: pooling and
        classifier are linear in them, so nothing of the paper's head is lost by averaging first. With membrane
        shortcuts it is the mean membrane potential, shifted so that its mean over space is the firing rate of the
        head's neurons, see `MembraneReadout`. With "avg" pooling `forward_head` then gives exactly the paper's head.
        """
        return self.readout(self.stages(self.stem(x, self.time_steps)))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Feature map [B, C', H', W'] to logits [B, num_classes] (features [B, C'] with `pre_logits`)."""
        x = self.global_pool(x)
        if self.drop_rate > 0.0:
            x = F.dropout(x, p=self.drop_rate, training=self.training)
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        """Images [B, C, H, W] or event clips [B, T, C, H, W] to logits [B, num_classes]."""
        return self.forward_head(self.forward_features(x))
