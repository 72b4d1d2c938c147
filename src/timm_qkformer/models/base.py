"""The base of all models: a stem, stages of blocks, a readout and a classifier, with timm's interface to them.

What a model is made of is a value, see `architecture`. Tensors are [T, B, C, H, W] from the stem to the readout that
ends `forward_features`.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any, List, Optional, Set, Tuple, Union

import torch
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import SelectAdaptivePool2d, calculate_drop_path_rates, get_device_dtype, trunc_normal_
from timm.models._features import feature_take_indices
from timm.models._input import update_model_args
from torch import Tensor, nn

from ..errors import check_number, check_whole, naming_settings
from ..execution.packing import Range
from ..layers import (
    Feedback,
    FeedbackBlock,
    FeedbackStage,
    MeanReadout,
    MembraneReadout,
    SpikingBlock,
    SpikingChain,
    SpikingPatchEmbed,
    SpikingStage,
    SpikingStem,
    as_sequence,
    get_mlp,
)
from ..layers.chain import unit_args
from ..neurons import NeuronLayer, get_neuron_layer
from ..operators import get_operator
from .architecture import Architecture, ChainSpec, EmbedSpec, with_operator_args
from .dilation import dilate
from .stepping import StreamState, run_step

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

# Those of small images, and of event cameras of 128 x 128 pixels, by the models that pool the least of either.
CIFAR10_CFG: dict[str, Any] = {
    **IMAGENET_CFG,
    "num_classes": 10,
    "input_size": (3, 32, 32),
    "pool_size": (8, 8),
    "crop_pct": 1.0,
    "mean": (0.4914, 0.4822, 0.4465),
    "std": (0.2470, 0.2435, 0.2616),
}
EVENTS_CFG: dict[str, Any] = {
    **IMAGENET_CFG,
    "num_classes": 10,
    "input_size": (2, 128, 128),
    "pool_size": (8, 8),
    "crop_pct": 1.0,
    "mean": (0.0, 0.0),
    "std": (1.0, 1.0),
}

# Files and command lines may ask for more than can ever be simulated; without a limit the machine would try.
MAX_TIME_STEPS = 10_000


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
            after attention keep their own threshold of 0.5, which `operator_args` changes.
        operator_args: Further arguments of operators by their registered names, such as {"ssa": {"scale": 0.25}}. They
            override arguments of the model that say the same.
        drop_rate: Dropout before the classifier.
        proj_drop_rate: Dropout after every token mixer and MLP, one mask for all time steps.
        drop_path_rate: Stochastic depth of the last block, rising linearly from 0, one mask for all time steps.
        output_stride: Keep maps from becoming coarser than this many pixels, 8 or 16 for segmentation: later stages
            dilate instead, as timm's convolutional networks do, see `dilation`. None: as the architecture has it.
        pooled_levels: Further feature maps for detectors, each max-pooled (3x3, of stride 2, within `output_stride`)
            from the one before. The classifier does not see them.

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
        operator_args: Optional[Mapping[str, Mapping[str, Any]]] = None,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        output_stride: Optional[int] = None,
        pooled_levels: int = 0,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        rates = {"drop_rate": drop_rate, "proj_drop_rate": proj_drop_rate, "drop_path_rate": drop_path_rate}
        for name, rate in rates.items():
            check_number(name, rate, 0, 1)
        if not architecture.stages:
            raise ValueError("architecture has no stages: give at least one")
        architecture = with_operator_args(architecture, {} if operator_args is None else operator_args)
        neuron_layer = get_neuron_layer(neuron, neuron_args)
        self.in_chans = check_whole("in_chans", in_chans, 1)
        self.num_classes = check_whole("num_classes", num_classes, 0)
        self.drop_rate = drop_rate
        self.set_time_steps(time_steps)

        stem, membrane_shortcut = architecture.stem, architecture.membrane_shortcut
        self.membrane_shortcut = membrane_shortcut
        args: dict[str, Any] = {"neuron_layer": neuron_layer, "membrane_shortcut": membrane_shortcut, **dd}
        reductions = [stem.reduction]
        for spec in architecture.stages:
            reductions.append(reductions[-1] * spec.embed.stride)
        self.stem = SpikingStem(
            in_chans,
            stem.dim,
            min_size=reductions[-1],
            **unit_args(stem, neuron_layer),
            **dd,
        )
        depths = [len(spec.blocks) for spec in architecture.stages]
        drop_paths: List[List[float]] = calculate_drop_path_rates(drop_path_rate, depths, stagewise=True)
        stages = []
        self.feature_info = []
        chs, numbers = stem.dim, self.stem.output_range
        for i, spec in enumerate(architecture.stages):
            embed = _build_embed(chs, spec.dim, spec.embed, numbers, args)
            chs, numbers = spec.dim, embed.output_range
            feedback = architecture.feedback if spec is architecture.stages[-1] else None
            block_layer = SpikingBlock if feedback is None else FeedbackBlock
            blocks = []
            for block, rate in zip(spec.blocks, drop_paths[i], strict=True):
                mixers = [partial(get_operator(m.operator), num_heads=m.num_heads, **m.options) for m in block.mixers]
                block_args = {"input_range": numbers, "mlp_layer": get_mlp(block.mlp), **args}
                blocks.append(block_layer(chs, mixers, block.mlp_ratio, proj_drop_rate, rate, **block_args))
                numbers = blocks[-1].output_range
            if feedback is None:
                stages.append(SpikingStage(embed, blocks))
            else:
                fed = Feedback(chs, len(blocks), feedback, neuron_layer, **dd)
                stages.append(FeedbackStage(embed, blocks, fed))
            self.feature_info.append({"num_chs": chs, "reduction": reductions[i + 1], "module": f"stages.{i}"})
        self.stages = nn.Sequential(*stages)
        if output_stride is not None:
            strides = dilate(stem.reduction, stages, output_stride)
            for info, stride in zip(self.feature_info, strides, strict=True):
                info["reduction"] = stride
            self.stem.min_size = strides[-1]
        self.is_dilated = output_stride is not None and output_stride < reductions[-1]
        self.pooled_strides: List[int] = []
        self._add_pooled_levels(pooled_levels, output_stride)
        fires = architecture.membrane_readout
        self.readout: nn.Module = MembraneReadout(neuron_layer, **dd) if fires else MeanReadout()

        self.num_features = self.head_hidden_size = chs
        self._create_head(global_pool, **dd)

    def _add_pooled_levels(self, count: int, output_stride: Optional[int]) -> None:
        for i in range(check_whole("pooled_levels", count, 0)):
            last: dict[str, Any] = self.feature_info[-1]
            stride = 1 if output_stride is not None and 2 * last["reduction"] > output_stride else 2
            self.pooled_strides.append(stride)
            self.feature_info.append({**last, "reduction": stride * last["reduction"], "module": f"pooled.{i}"})

    def _create_head(self, global_pool: str, device: Any, dtype: Any) -> None:
        if not isinstance(global_pool, str):
            raise ValueError(f"global_pool={global_pool!r} must be the name of a pooling, such as 'avg', or ''")
        with naming_settings("the pooling", {"global_pool": global_pool}):
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
        time_steps = check_whole("time_steps", time_steps, 1)
        if time_steps > MAX_TIME_STEPS:
            raise ValueError(f"time_steps={time_steps!r} must be at most {MAX_TIME_STEPS:,}")
        self.time_steps = time_steps
        update_model_args(self, time_steps=time_steps)  # so that timm saves it with the model

    @torch.jit.ignore
    def no_weight_decay(self) -> Set[str]:
        """Parameters that timm's optimizers do not decay."""
        return set()

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns by which timm groups parameters for layer-wise learning rates."""
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
        """The classifier: a Linear, or Identity without classes."""
        return self.head

    @torch.jit.ignore
    def reset_classifier(self, num_classes: int, global_pool: Optional[str] = None) -> None:
        """A new classifier for `num_classes` classes (0: none) and, if given, another pooling."""
        self.num_classes = check_whole("num_classes", num_classes, 0)
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
        """Forward features that also returns the stages' maps [B, C, H, W], plain means over T, then pooled levels.

        The first result is what `forward_features` gives or, if that took fewer stages, the last stage's mean over T.

        Args:
            x: Images [B, C, H, W] or event clips [B, T, C, H, W].
            indices: Take the last n maps if int, all if None, the given ones if a sequence.
            norm: There is no norm to apply; accepted for timm's interface.
            stop_early: Stop after the last stage that is asked for.
            output_fmt: "NCHW".
            intermediates_only: Return the list of maps alone.
        """
        assert output_fmt in ("NCHW",), "Output shape must be NCHW."
        intermediates = []
        take_indices, max_index = feature_take_indices(len(self.stages) + len(self.pooled_strides), indices)
        if torch.jit.is_scripting() or not stop_early:  # can't slice stages in torchscript
            stages = self.stages
        else:
            stages = self.stages[: max_index + 1]

        x = self.stem(x, self.time_steps)
        for feat_idx, stage in enumerate(stages):
            x = stage(x)
            if feat_idx in take_indices:
                intermediates.append(x.mean(0))
        if max_index >= len(self.stages):
            level = x.mean(0)
            for i, stride in enumerate(self.pooled_strides):
                level = F.max_pool2d(level, 3, stride, 1)
                if len(self.stages) + i in take_indices:
                    intermediates.append(level)

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
        take_indices, max_index = feature_take_indices(len(self.stages) + len(self.pooled_strides), indices)
        prune_end = max_index < len(self.stages) - 1
        self.pooled_strides = self.pooled_strides[: max(0, max_index + 1 - len(self.stages))]
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

    @torch.jit.ignore
    def step(
        self, frame: Optional[Tensor], state: Optional[StreamState] = None, donate: bool = False
    ) -> Tuple[Tensor, StreamState]:
        """One time step: a frame [B, C, H, W] to the logits [B, num_classes] of all steps so far, and the next state.

        T steps give what `forward` gives for a clip of these frames. Normalise frames as clips. In train mode batch
        norms see one step at a time, and dropout and stochastic depth draw anew for each.

        Args:
            frame: [B, C, H, W]. None: the one of the step before, as a static image is; its first convolution is then
                not run again.
            state: What the step before returned; None at rest.
            donate: The state is not used again, and the next one may take its memory. Deployed models are faster so.

        Raises:
            ValueError: For a state of another model, input size, dtype or batch, or a model that couples samples.
        """

        def to_currents(frame: Tensor) -> Tensor:
            return self.stem.currents(as_sequence(frame, self.stem.in_chs, self.stem.min_size))[0]

        def to_maps(currents: Tensor) -> Tensor:
            maps: Tensor = self.stages(self.stem.fire(currents.unsqueeze(0)))
            return maps

        return run_step(self, (to_currents, to_maps), frame, state, donate)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Feature map [B, C', H', W'] to logits [B, num_classes] (features [B, C'] with `pre_logits`)."""
        x = self.global_pool(x)
        if self.drop_rate > 0.0:
            x = F.dropout(x, p=self.drop_rate, training=self.training)
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        """Images [B, C, H, W] or event clips [B, T, C, H, W] to logits [B, num_classes]."""
        return self.forward_head(self.forward_features(x))


def _build_embed(
    chs: int, dim: int, spec: Union[EmbedSpec, ChainSpec], numbers: Range, args: Mapping[str, Any]
) -> Union[SpikingPatchEmbed, SpikingChain]:
    """A stage's embedding, from `chs` channels that hold `numbers`."""
    if isinstance(spec, ChainSpec):
        chain_args = {name: value for name, value in args.items() if name != "membrane_shortcut"}
        return SpikingChain(chs, *spec, input_range=numbers, **chain_args)
    hidden = int(dim * spec.hidden_ratio)
    branches = (spec.shortcut, spec.strided, spec.pool_shortcut)
    return SpikingPatchEmbed(chs, dim, spec.pools, hidden, *branches, input_range=numbers, **args)
