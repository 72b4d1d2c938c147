"""The skeleton of hierarchical spiking transformers (HST), and timm's interface to it.

A stem and three stages. A stage is a spiking patch embedding with deformed shortcut and a row of transformer blocks;
what mixes the tokens in the blocks is up to the paper, whose file this one serves. Tensors are [T, B, C, H, W] from
the stem to the readout that ends `forward_features`.

The two kinds of residual connection:

    activation before addition ("SEW")    x + LIF(BN(W s))     sums of spikes travel from block to block
    membrane shortcut ("MS")              x + BN(W LIF(x))     membrane potentials do

MS has a neuron in front of every weight layer and none after the addition (QKFormer, arXiv 2403.16552, eq. 17).
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, List, NamedTuple, Optional, Set, Tuple, Union

import torch
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import SelectAdaptivePool2d, calculate_drop_path_rates, get_device_dtype, trunc_normal_
from timm.models._features import feature_take_indices
from timm.models._input import update_model_args
from torch import Tensor, nn

from ..layers import (
    LIF,
    MeanReadout,
    MembraneReadout,
    SpikingMlp,
    SpikingPatchEmbed,
    SpikingStem,
    TimeDropPath,
    add_counts,
    checkpoint_once,
    get_neuron_layer,
)
from ..layers.neurons import NeuronLayer

__all__ = ["IMAGENET_CFG", "Embedding", "HierarchicalSpikingTransformer", "MixerLayer", "StageEmbed", "per_stage"]

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

# Called as layer(dim, proj_drop=..., neuron_layer=..., membrane_shortcut=..., device=..., dtype=...).
MixerLayer = Callable[..., nn.Module]


class StageEmbed(NamedTuple):
    """One stage's patch embedding: which of its convolutions halve the size, and what lies between and beside them."""

    pools: Tuple[bool, ...]
    hidden_ratio: float = 1.0
    shortcut: bool = True
    strided: bool = False
    pool_shortcut: bool = False


class Embedding(NamedTuple):
    """How a model goes from pixels to its last stage's tokens. The stem halves the size by pooling or by stride."""

    stem_pool: bool
    stages: Tuple[StageEmbed, StageEmbed, StageEmbed]
    stem_stride: int = 1


class SpikingBlock(nn.Module):
    """x = x + mixer(x); x = x + mlp(x), on spike sums [T, B, C, H, W] (QKFormer, eq. 11 to 13).

    With membrane shortcuts x holds membrane potentials: x = x + mixer(LIF(x)); x = x + mlp(LIF(x)) (eq. 17).
    """

    def __init__(
        self,
        dim: int,
        mixer_layer: MixerLayer,
        mlp_ratio: float = 4.0,
        proj_drop: float = 0.0,
        drop_path: float = 0.0,
        neuron_layer: NeuronLayer = LIF,
        membrane_shortcut: bool = False,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        args: dict[str, Any] = {"neuron_layer": neuron_layer, "membrane_shortcut": membrane_shortcut, **dd}
        self.neuron1 = neuron_layer(**dd) if membrane_shortcut else nn.Identity()
        self.attn = mixer_layer(dim, proj_drop=proj_drop, **args)
        self.neuron2 = neuron_layer(**dd) if membrane_shortcut else nn.Identity()
        self.mlp = SpikingMlp(dim, int(dim * mlp_ratio), proj_drop, **args)
        self.drop_path = TimeDropPath(drop_path) if drop_path > 0.0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = add_counts(x, self.drop_path(self.attn(self.neuron1(x))))
        return add_counts(x, self.drop_path(self.mlp(self.neuron2(x))))


class SpikingStage(nn.Module):
    """Patch embedding, then blocks: [T, B, C, H, W] to [T, B, C', H', W'], spike sums or membrane potentials."""

    def __init__(
        self,
        in_chs: int,
        out_chs: int,
        embed: StageEmbed,
        mixer_layer: MixerLayer,
        mlp_ratio: float,
        proj_drop: float,
        drop_paths: Sequence[float],
        neuron_layer: NeuronLayer,
        membrane_shortcut: bool,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        args: dict[str, Any] = {
            "neuron_layer": neuron_layer,
            "membrane_shortcut": membrane_shortcut,
            "device": device,
            "dtype": dtype,
        }
        self.grad_checkpointing = False
        self.embed = SpikingPatchEmbed(
            in_chs,
            out_chs,
            embed.pools,
            int(out_chs * embed.hidden_ratio),
            embed.shortcut,
            embed.strided,
            embed.pool_shortcut,
            **args,
        )
        self.blocks = nn.Sequential(
            *(SpikingBlock(out_chs, mixer_layer, mlp_ratio, proj_drop, rate, **args) for rate in drop_paths)
        )

    def forward(self, x: Tensor) -> Tensor:
        if self.grad_checkpointing and not torch.jit.is_scripting():
            x = checkpoint_once(self.embed, x)
            for block in self.blocks:
                x = checkpoint_once(block, x)
            return x
        return self.blocks(self.embed(x))


class HierarchicalSpikingTransformer(nn.Module):
    """Stem, three stages, readout and classifier, with timm's model interface. Papers' models derive from it.

    Takes images [B, C, H, W], shown for `time_steps` steps, or event clips [B, T, C, H, W], which bring their own T.
    Each forward pass starts from rest, and no sample sees its batch mates.

    Args:
        embedding: Downsampling.
        mixer_layers: Factory of the blocks' token mixer, one per stage.
        membrane_shortcut: Residual connections between membrane potentials instead of spike sums.
        in_chans: Input channels.
        num_classes: Classes; 0 for no classifier.
        global_pool: timm's pooling of the feature map before the classifier ("avg", "max", "avgmax", "catavgmax" or
            "" for none).
        time_steps: Time steps T that a static image is shown for.
        embed_dims: Width of each stage.
        depths: Blocks in each stage.
        mlp_ratio: MLP width relative to the stage's, one number or one per stage.
        neuron: "lif", "if" or "plif", or a neuron layer such as `functools.partial(LIF, surrogate="atan")`.
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
        embedding: Embedding,
        mixer_layers: Sequence[MixerLayer],
        membrane_shortcut: bool,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        time_steps: int = 4,
        embed_dims: Sequence[int] = (96, 192, 384),
        depths: Sequence[int] = (1, 2, 7),
        mlp_ratio: Union[float, Sequence[float]] = 4.0,
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
        widths = per_stage("embed_dims", embed_dims, minimum=2)
        blocks = per_stage("depths", depths, minimum=0)
        ratios = per_stage("mlp_ratio", mlp_ratio)
        if any(not width * ratio >= 1 for width, ratio in zip(widths, ratios, strict=True)):
            raise ValueError(f"mlp_ratio={mlp_ratio!r} leaves an MLP without a channel, embed_dims={embed_dims!r}")
        rates = {"drop_rate": drop_rate, "proj_drop_rate": proj_drop_rate, "drop_path_rate": drop_path_rate}
        for name, rate in rates.items():
            if not 0.0 <= rate <= 1.0:
                raise ValueError(f"{name}={rate!r} must be a probability, between 0 and 1")
        neuron_layer = get_neuron_layer(neuron, neuron_args)
        self.in_chans = in_chans
        self.num_classes = num_classes
        self.drop_rate = drop_rate
        self.set_time_steps(time_steps)

        reductions = [2**embedding.stem_pool * embedding.stem_stride]
        for stage in embedding.stages:
            reductions.append(reductions[-1] * 2 ** sum(stage.pools))
        self.stem = SpikingStem(
            in_chans,
            widths[0] // 2,
            pool=embedding.stem_pool,
            stride=embedding.stem_stride,
            min_size=reductions[-1],
            neuron_layer=nn.Identity if membrane_shortcut else neuron_layer,
            **dd,
        )
        drop_paths: List[List[float]] = calculate_drop_path_rates(drop_path_rate, blocks, stagewise=True)
        stages = []
        self.feature_info = []
        for i in range(len(widths)):
            stages.append(
                SpikingStage(
                    widths[i - 1] if i > 0 else widths[0] // 2,
                    widths[i],
                    embedding.stages[i],
                    mixer_layers[i],
                    ratios[i],
                    proj_drop_rate,
                    drop_paths[i],
                    neuron_layer,
                    membrane_shortcut,
                    **dd,
                )
            )
            self.feature_info.append({"num_chs": widths[i], "reduction": reductions[i + 1], "module": f"stages.{i}"})
        self.stages = nn.Sequential(*stages)
        self.readout: nn.Module = MembraneReadout(neuron_layer, **dd) if membrane_shortcut else MeanReadout()

        self.num_features = self.head_hidden_size = widths[-1]
        self._create_head(global_pool, **dd)

    def _create_head(self, global_pool: str, device: Any, dtype: Any) -> None:
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


def per_stage(name: str, value: Any, minimum: Optional[int] = None, stages: int = 3) -> List[Any]:
    """One value per stage, from one for all or a sequence."""
    values: List[Any] = [value] * stages if isinstance(value, (int, float, str)) else list(value)
    if len(values) != stages:
        raise ValueError(f"{name}={value!r} must have one entry for each of the {stages} stages, not {len(values)}")
    if minimum is not None and any(not isinstance(v, int) or v < minimum for v in values):
        raise ValueError(f"{name}={value!r} must be whole numbers, none of them below {minimum}")
    return values
