"""QKFormer: Hierarchical Spiking Transformer using Q-K Attention.

Paper: https://arxiv.org/abs/2403.16552 (NeurIPS 2024)
Authors' code: https://github.com/zhouchenlin2096/QKFormer

A stem and three stages. A stage is a spiking patch embedding with deformed shortcut and a row of transformer
blocks: Q-K attention where there are many tokens, spiking self-attention where there are few. Tensors are
[T, B, C, H, W] from the stem's neurons to the mean over T that ends `forward_features`.
"""

import re
from collections.abc import Sequence
from typing import Any, List, NamedTuple, Optional, Set, Tuple, Union

import torch
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import SelectAdaptivePool2d, calculate_drop_path_rates, get_device_dtype, trunc_normal_
from timm.models._builder import build_model_with_cfg
from timm.models._features import feature_take_indices
from timm.models._manipulate import checkpoint, checkpoint_seq
from timm.models._registry import generate_default_cfgs, register_model
from torch import Tensor, nn

from ..layers import (
    LIF,
    QKChannelAttention,
    QKTokenAttention,
    SpikingMlp,
    SpikingPatchEmbed,
    SpikingSelfAttention,
    SpikingStem,
    TimeDropPath,
    get_neuron_layer,
)
from ..layers.neurons import NeuronLayer
from ._checkpoint import StateDict, check_against_model, rename_tensors, unwrap_checkpoint

__all__ = ["QKFormer"]

ATTENTIONS: dict[str, type[nn.Module]] = {
    "qkta": QKTokenAttention,
    "qkca": QKChannelAttention,
    "ssa": SpikingSelfAttention,
}


class StageEmbed(NamedTuple):
    """One stage's patch embedding: which of its convolutions pool, and what lies between and beside them."""

    pools: Tuple[bool, ...]
    hidden_ratio: float = 1.0
    shortcut: bool = True


class Embedding(NamedTuple):
    """How a model goes from pixels to its last stage's tokens (paper, table 2 and appendix; release)."""

    stem_pool: bool
    stages: Tuple[StageEmbed, StageEmbed, StageEmbed]


EMBEDDINGS = {
    # strides 2 | 4, 8, 16
    "imagenet": Embedding(True, (StageEmbed((True, False)), StageEmbed((True, False)), StageEmbed((True, False)))),
    # strides 1 | 1, 2, 4
    "cifar": Embedding(False, (StageEmbed((False,)), StageEmbed((False, True)), StageEmbed((False, True)))),
    # strides 1 | 2, 8, 16
    "events": Embedding(
        False,
        (
            StageEmbed((True,), shortcut=False),
            StageEmbed((True, True), hidden_ratio=0.5),
            StageEmbed((False, True)),
        ),
    ),
}


class SpikingBlock(nn.Module):
    """x = x + attention(x); x = x + mlp(x), on spike sums [T, B, C, H, W] (paper, eq. 11 to 13)."""

    def __init__(
        self,
        dim: int,
        attn: str,
        num_heads: int,
        mlp_ratio: float = 4.0,
        proj_drop: float = 0.0,
        drop_path: float = 0.0,
        neuron_layer: NeuronLayer = LIF,
        batch_coupled: bool = False,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        args: dict[str, Any] = {"neuron_layer": neuron_layer, "device": device, "dtype": dtype}
        attn_args: dict[str, Any] = {"batch_coupled": batch_coupled} if attn == "ssa" else {}
        self.attn = ATTENTIONS[attn](dim, num_heads, proj_drop, **attn_args, **args)
        self.mlp = SpikingMlp(dim, int(dim * mlp_ratio), proj_drop, **args)
        self.drop_path = TimeDropPath(drop_path) if drop_path > 0.0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.attn(x))
        return x + self.drop_path(self.mlp(x))


class SpikingStage(nn.Module):
    """Patch embedding, then blocks: spikes [T, B, C, H, W] to spike sums [T, B, C', H', W']."""

    def __init__(
        self,
        in_chs: int,
        out_chs: int,
        embed: StageEmbed,
        attn: str,
        num_heads: int,
        mlp_ratio: float,
        proj_drop: float,
        drop_paths: Sequence[float],
        neuron_layer: NeuronLayer,
        batch_coupled: bool,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        args: dict[str, Any] = {"neuron_layer": neuron_layer, "device": device, "dtype": dtype}
        self.grad_checkpointing = False
        self.embed = SpikingPatchEmbed(
            in_chs, out_chs, embed.pools, int(out_chs * embed.hidden_ratio), embed.shortcut, **args
        )
        self.blocks = nn.Sequential(
            *(
                SpikingBlock(out_chs, attn, num_heads, mlp_ratio, proj_drop, rate, batch_coupled=batch_coupled, **args)
                for rate in drop_paths
            )
        )

    def forward(self, x: Tensor) -> Tensor:
        if self.grad_checkpointing and not torch.jit.is_scripting():
            return checkpoint_seq(self.blocks, checkpoint(self.embed, x))
        return self.blocks(self.embed(x))


class QKFormer(nn.Module):
    """Hierarchical spiking transformer (HST).

    Takes images [B, C, H, W], shown for `time_steps` steps, or event clips [B, T, C, H, W], which bring their own T.
    Each forward pass starts from rest, and no sample sees its batch mates.

    Args:
        in_chans: Input channels.
        num_classes: Classes; 0 for no classifier.
        global_pool: timm's pooling of the firing-rate map before the classifier ("avg", "max", "avgmax", "catavgmax"
            or "" for none).
        time_steps: Time steps T that a static image is shown for.
        patch_embed: Downsampling: "imagenet" (stride 16), "cifar" (stride 4) or "events" (stride 16).
        embed_dims: Width of each stage.
        depths: Blocks in each stage.
        num_heads: Attention heads, one number or one per stage.
        mlp_ratio: MLP width relative to the stage's, one number or one per stage.
        attn: Attention, one or one per stage: "qkta", "qkca" or "ssa".
        neuron: "lif", "if" or "plif", or a neuron layer such as `functools.partial(LIF, surrogate="atan")`.
        batch_coupled: Reproduce the release's self-attention, in which samples influence their batch mates (its
            published accuracies were measured so). Off, each sample is on its own.
        drop_rate: Dropout before the classifier.
        proj_drop_rate: Dropout after every attention and MLP, one mask for all time steps.
        drop_path_rate: Stochastic depth of the last block, rising linearly from 0, one mask for all time steps.

    Raises:
        ValueError: For an argument outside its range.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        time_steps: int = 4,
        patch_embed: str = "imagenet",
        embed_dims: Sequence[int] = (96, 192, 384),
        depths: Sequence[int] = (1, 2, 7),
        num_heads: Union[int, Sequence[int]] = 6,
        mlp_ratio: Union[float, Sequence[float]] = 4.0,
        attn: Union[str, Sequence[str]] = ("qkta", "qkta", "ssa"),
        neuron: Union[str, NeuronLayer] = "lif",
        batch_coupled: bool = False,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        if patch_embed not in EMBEDDINGS:
            raise ValueError(f"patch_embed={patch_embed!r} is unknown, choose one of {sorted(EMBEDDINGS)}")
        embedding = EMBEDDINGS[patch_embed]
        widths = _per_stage("embed_dims", embed_dims, minimum=2)
        blocks = _per_stage("depths", depths, minimum=0)
        heads = _per_stage("num_heads", num_heads, minimum=1)
        ratios = _per_stage("mlp_ratio", mlp_ratio)
        attns = _per_stage("attn", attn)
        for name in attns:
            if name not in ATTENTIONS:
                raise ValueError(f"attn={attn!r}: {name!r} is unknown, choose from {sorted(ATTENTIONS)}")
        neuron_layer = get_neuron_layer(neuron)
        self.in_chans = in_chans
        self.num_classes = num_classes
        self.drop_rate = drop_rate
        self.set_time_steps(time_steps)

        reductions = [2**embedding.stem_pool]
        for stage in embedding.stages:
            reductions.append(reductions[-1] * 2 ** sum(stage.pools))
        self.stem = SpikingStem(
            in_chans,
            widths[0] // 2,
            pool=embedding.stem_pool,
            min_size=reductions[-1],
            neuron_layer=neuron_layer,
            **dd,
        )
        drop_paths = calculate_drop_path_rates(drop_path_rate, blocks, stagewise=True)
        stages = []
        self.feature_info = []
        for i in range(len(widths)):
            stages.append(
                SpikingStage(
                    widths[i - 1] if i > 0 else widths[0] // 2,
                    widths[i],
                    embedding.stages[i],
                    attns[i],
                    heads[i],
                    ratios[i],
                    proj_drop_rate,
                    drop_paths[i],
                    neuron_layer,
                    batch_coupled,
                    **dd,
                )
            )
            self.feature_info.append({"num_chs": widths[i], "reduction": reductions[i + 1], "module": f"stages.{i}"})
        self.stages = nn.Sequential(*stages)

        self.num_features = self.head_hidden_size = widths[-1]
        self._create_head(global_pool, **dd)

    def _create_head(self, global_pool: str, device: Any, dtype: Any) -> None:
        self.global_pool = SelectAdaptivePool2d(pool_type=global_pool, flatten=bool(global_pool))
        self.head_hidden_size = self.num_features * self.global_pool.feat_mult()
        if self.num_classes > 0:
            self.head = nn.Linear(self.head_hidden_size, self.num_classes, device=device, dtype=dtype)
            trunc_normal_(self.head.weight, std=0.02)
            nn.init.zeros_(self.head.bias)
        else:
            self.head = nn.Identity()

    @torch.jit.ignore
    def set_time_steps(self, time_steps: int) -> None:
        """Show static images for this many time steps from now on; the weights do not depend on it."""
        if isinstance(time_steps, bool) or not isinstance(time_steps, int) or time_steps < 1:
            raise ValueError(f"time_steps={time_steps!r} must be an integer of at least 1")
        self.time_steps = time_steps

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
        for stage in self.stages:
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
        """Forward features that also returns the stages' firing-rate maps [B, C, H, W] (mean over T).

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
        return x.mean(0), intermediates

    def prune_intermediate_layers(
        self,
        indices: Union[int, List[int]] = 1,
        prune_norm: bool = False,
        prune_head: bool = True,
    ) -> List[int]:
        """Remove the stages, and with them the head, that the given intermediates do not need."""
        take_indices, max_index = feature_take_indices(len(self.stages), indices)
        prune_end = max_index < len(self.stages) - 1
        self.stages = self.stages[: max_index + 1]
        if prune_end:
            self.num_features = self.head_hidden_size = self.feature_info[max_index]["num_chs"]
        if prune_head or prune_end:
            self.reset_classifier(0, "")
        return take_indices

    def forward_features(self, x: Tensor) -> Tensor:
        """Images [B, C, H, W] or event clips [B, T, C, H, W] to the firing-rate map [B, C', H', W'].

        The map is the last stage's spike sums averaged over T. Pooling and classifier are linear in them, so nothing
        of the paper's head is lost by averaging first.
        """
        return self.stages(self.stem(x, self.time_steps)).mean(0)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Firing-rate map [B, C', H', W'] to logits [B, num_classes] (features [B, C'] with `pre_logits`)."""
        x = self.global_pool(x)
        if self.drop_rate > 0.0:
            x = F.dropout(x, p=self.drop_rate, training=self.training)
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        """Images [B, C, H, W] or event clips [B, T, C, H, W] to logits [B, num_classes]."""
        return self.forward_head(self.forward_features(x))


def _per_stage(name: str, value: Any, minimum: Optional[int] = None, stages: int = 3) -> List[Any]:
    """One value per stage, from one for all or a sequence."""
    values = [value] * stages if isinstance(value, (int, float, str)) else list(value)
    if len(values) != stages:
        raise ValueError(f"{name}={value!r} must have one entry for each of the {stages} stages, not {len(values)}")
    if minimum is not None and any(v < minimum for v in values):
        raise ValueError(f"{name}={value!r} must have no entry below {minimum}")
    return values


_RELEASE_EMBED = re.compile(r"patch_embed(\d)\.proj(\d*)_(conv|bn)\.(\w+)")
_RELEASE_SHORTCUT = re.compile(r"patch_embed(\d)\.proj_res_(conv|bn)\.(\w+)")
_RELEASE_ATTN = re.compile(r"stage(\d)\.(\d+)\.(?:tssa|ssa|attn)\.([qkv]|proj)_(conv|bn)\.(\w+)")
_RELEASE_MLP = re.compile(r"stage(\d)\.(\d+)\.mlp\.(?:fc|mlp)([12])_(conv|bn)\.(\w+)")


class _ReleaseNames:
    """The release's tensor names in terms of ours: ImageNet, CIFAR and event spellings.

    The release numbers only the stages that have blocks, counts the event models' first pooling to the stem, and
    numbers convolutions within an embedding with gaps; so what counts is each one's place in the order.
    """

    def __init__(self, names: Sequence[str], model: QKFormer) -> None:
        found = {m.group(1, 2) for m in map(_RELEASE_EMBED.fullmatch, names) if m}
        order = sorted(found, key=lambda place: (place[0], int(place[1] or 0)))
        convs = ["stem"]
        for i, stage in enumerate(model.stages):
            convs += [f"stages.{i}.embed.main.{j}" for j in range(len(stage.embed.main))]
        self.convs = dict(zip(order, convs, strict=False))  # leftovers are reported by name
        shortcuts = [i for i, stage in enumerate(model.stages) if stage.embed.shortcut is not None]
        self.shortcuts = {str(n + 1): f"stages.{i}.embed.shortcut" for n, i in enumerate(shortcuts)}
        stages = [i for i, stage in enumerate(model.stages) if len(stage.blocks) > 0]
        self.stages = {str(n + 1): f"stages.{i}.blocks" for n, i in enumerate(stages)}

    def __call__(self, name: str) -> Optional[str]:
        if name in ("head.weight", "head.bias"):
            return name
        if m := _RELEASE_EMBED.fullmatch(name):
            unit, rest = self.convs.get((m[1], m[2])), f"{m[3]}.{m[4]}"
        elif m := _RELEASE_SHORTCUT.fullmatch(name):
            unit, rest = self.shortcuts.get(m[1]), f"{m[2]}.{m[3]}"
        elif m := _RELEASE_ATTN.fullmatch(name):
            unit, rest = self.stages.get(m[1]), f"{m[2]}.attn.{m[3]}.{m[4]}.{m[5]}"
        elif m := _RELEASE_MLP.fullmatch(name):
            unit, rest = self.stages.get(m[1]), f"{m[2]}.mlp.fc{m[3]}.{m[4]}.{m[5]}"
        else:
            return None
        return f"{unit}.{rest}" if unit else None


def checkpoint_filter_fn(state_dict: dict[str, Any], model: nn.Module) -> StateDict:
    """Turn a checkpoint of the authors' release into this module's state dict; pass our own through unchanged.

    Takes plain state dicts and training checkpoints ("model" or "state_dict"), with or without DDP's "module."
    prefix, in the release's ImageNet, CIFAR and event spellings. The number of classes and of input channels may
    differ from the model's: timm adapts those two afterwards.

    Raises:
        ValueError: Naming every missing, extra or misshapen tensor.
    """
    tensors = unwrap_checkpoint(state_dict)
    if not any(name.startswith("patch_embed") for name in tensors):
        return tensors
    assert isinstance(model, QKFormer)
    names = _ReleaseNames(list(tensors), model)
    renamed = rename_tensors(tensors, names)
    original_names = {names(name) or name: name for name in tensors}
    for name, tensor in renamed.items():
        if name.endswith("conv.weight") and tensor.ndim == 3:  # the release's Conv1d over tokens
            renamed[name] = tensor.unsqueeze(-1)
    check_against_model(
        renamed,
        model,
        original_names,
        adaptable={"stem.conv.weight": 1, "head.weight": 0, "head.bias": 0},
        optional=("head.weight", "head.bias"),
    )
    return renamed


def _cfg(url: str = "", **kwargs: Any) -> dict[str, Any]:
    return {
        "url": url,
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (14, 14),
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "stem.conv",
        "classifier": "head",
        "paper_ids": "arXiv:2403.16552",
        "paper_name": "QKFormer: Hierarchical Spiking Transformer using Q-K Attention",
        "origin_url": "https://github.com/zhouchenlin2096/QKFormer",
        **kwargs,
    }


default_cfgs = generate_default_cfgs(
    {
        "qkformer_hst10_384.untrained": _cfg(),
        "qkformer_hst10_512.untrained": _cfg(),
        "qkformer_hst10_768.untrained": _cfg(),
        "qkformer_hst4_384.untrained": _cfg(
            num_classes=10,
            input_size=(3, 32, 32),
            pool_size=(8, 8),
            crop_pct=1.0,
            mean=(0.4914, 0.4822, 0.4465),
            std=(0.2470, 0.2435, 0.2616),
        ),
        "qkformer_hst2_256.untrained": _cfg(
            num_classes=10,
            input_size=(2, 128, 128),
            pool_size=(8, 8),
            crop_pct=1.0,
            mean=(0.0, 0.0),
            std=(1.0, 1.0),
        ),
        "test_qkformer.untrained": _cfg(input_size=(3, 64, 64), pool_size=(4, 4), crop_pct=1.0),
    }
)


def _create_qkformer(variant: str, pretrained: bool = False, **kwargs: Any) -> QKFormer:
    return build_model_with_cfg(
        QKFormer,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": (0, 1, 2), "feature_cls": "getter"},
        **kwargs,
    )


@register_model
def qkformer_hst10_384(pretrained: bool = False, **kwargs: Any) -> QKFormer:
    """HST-10-384 for ImageNet: 16.47 M parameters, T = 4."""
    model_args = {"embed_dims": (96, 192, 384), "depths": (1, 2, 7), "num_heads": 6}
    return _create_qkformer("qkformer_hst10_384", pretrained, **dict(model_args, **kwargs))


@register_model
def qkformer_hst10_512(pretrained: bool = False, **kwargs: Any) -> QKFormer:
    """HST-10-512 for ImageNet: 29.08 M parameters, T = 4."""
    model_args = {"embed_dims": (128, 256, 512), "depths": (1, 2, 7), "num_heads": 8}
    return _create_qkformer("qkformer_hst10_512", pretrained, **dict(model_args, **kwargs))


@register_model
def qkformer_hst10_768(pretrained: bool = False, **kwargs: Any) -> QKFormer:
    """HST-10-768 for ImageNet: 64.96 M parameters, T = 4."""
    model_args = {"embed_dims": (192, 384, 768), "depths": (1, 2, 7), "num_heads": 12}
    return _create_qkformer("qkformer_hst10_768", pretrained, **dict(model_args, **kwargs))


@register_model
def qkformer_hst4_384(pretrained: bool = False, **kwargs: Any) -> QKFormer:
    """HST-4-384 for CIFAR: 6.71 M parameters with 10 classes, T = 4."""
    model_args = {"patch_embed": "cifar", "embed_dims": (96, 192, 384), "depths": (1, 1, 2), "num_heads": 8}
    return _create_qkformer("qkformer_hst4_384", pretrained, **dict(model_args, **kwargs))


@register_model
def qkformer_hst2_256(pretrained: bool = False, **kwargs: Any) -> QKFormer:
    """HST-2-256 for event cameras: 1.50 M parameters with 10 classes, T = 16.

    The first stage has no blocks. The release's DVS128 Gesture model has `mlp_ratio=4` and 11 classes.
    """
    model_args = {
        "patch_embed": "events",
        "embed_dims": (32, 128, 256),
        "depths": (0, 1, 1),
        "num_heads": 16,
        "mlp_ratio": 1.0,
        "time_steps": 16,
    }
    return _create_qkformer("qkformer_hst2_256", pretrained, **dict(model_args, **kwargs))


@register_model
def test_qkformer(pretrained: bool = False, **kwargs: Any) -> QKFormer:
    """A tiny HST with every kind of layer, for tests."""
    model_args = {
        "embed_dims": (16, 32, 64),
        "depths": (1, 1, 2),
        "num_heads": 4,
        "attn": ("qkta", "qkca", "ssa"),
    }
    return _create_qkformer("test_qkformer", pretrained, **dict(model_args, **kwargs))
