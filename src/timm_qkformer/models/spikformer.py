"""Spikformer: When Spiking Neural Network Meets Transformer; and with Convolution-based Max-pooling LIF (CML).

Paper: https://arxiv.org/abs/2209.15425 (ICLR 2023)
Authors' code: https://github.com/ZK-Zhou/spikformer
CML: https://arxiv.org/abs/2305.05889, https://github.com/zhouchenlin2096/Spikingformer-CML

One resolution, spiking self-attention throughout, shortcuts that add spikes. CML pools before the neurons instead of
after them, so that gradients take the way of the largest current.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Optional, Union

from timm.models._registry import generate_default_cfgs
from torch import nn

from ..layers import PositionSpec
from .architecture import Architecture, flat, hierarchy
from .base import SpikingTransformer
from .checkpoints import StateDict, unwrap_checkpoint, without_constants
from .flat import CIFAR_POOLS, IMAGENET_POOLS, flat_cfgs, image_variants, splitting
from .flat_checkpoints import Named, block_parts, norms_of_block, translate_flat
from .positions import Stored, layer_norm, neuron_constants
from .qkformer import SPEDS
from .variants import Variant, register_variants

_SPEDS = {IMAGENET_POOLS: ("imagenet", "events"), CIFAR_POOLS: ("cifar",)}  # of the same stride, the default first


class Spikformer(SpikingTransformer):
    """Spikformer: convolutions that split the picture into patches (SPS), then blocks of spiking self-attention.

    Takes images [B, C, H, W], shown for `time_steps` steps, or event clips [B, T, C, H, W], which bring their own T.
    Each forward pass starts from rest, and no sample sees its batch mates.

    Args:
        patch_embed: "sps", or "speds": QKFormer's embedding in its place, all else unchanged (QKFormer, arXiv
            2403.16552, Table 4). That has no public code; here it is QKFormer's three embeddings without blocks between
            them, so that there are three stages.
        speds: Which of QKFormer's embeddings "speds" is: of stride 16 "imagenet" or, the event models' default,
            "events", of stride 4 "cifar". None: the first of `pools`' stride.
        pools: Which of the four convolutions halve the size: "1111" (ImageNet, events) or "0011" (CIFAR).
        attn: Token mixer, a registered operator: "ssa", "sdsa", "qkta", ...; one, or one per block.
        embed_dim: Width, a multiple of 8.
        depth: Blocks.
        num_heads: Attention heads, as `attn`.
        mlp_ratio: MLP width relative to `embed_dim`, as `attn`.
        qkv_bias: Give the projections to Q, K and V a bias, as the CIFAR releases do.
        scale: Scale of spiking self-attention.
        cml: Pool before the neurons.
        **kwargs: `in_chans`, `num_classes`, `global_pool`, `time_steps`, `neuron`, `neuron_args`, `operator_args`,
            `drop_rate`, `proj_drop_rate`, `drop_path_rate`, `device` and `dtype`, see `SpikingTransformer`.

    Raises:
        ValueError: For `pools` or an embedding that there is not, or another argument outside its range.
    """

    def __init__(
        self,
        patch_embed: str = "sps",
        pools: str = IMAGENET_POOLS,
        attn: Union[str, Sequence[str]] = "ssa",
        embed_dim: int = 512,
        depth: int = 8,
        num_heads: Union[int, Sequence[int]] = 8,
        mlp_ratio: Union[float, Sequence[float]] = 4.0,
        qkv_bias: bool = False,
        scale: float = 0.125,
        cml: bool = False,
        speds: Optional[str] = None,
        **kwargs: Any,
    ) -> None:
        options: dict[str, dict[str, Any]] = {"": {"qkv_bias": qkv_bias}, "ssa": {"scale": scale}}
        units = splitting(embed_dim, pools, "currents" if cml else "spikes")
        spikformer = flat(units, PositionSpec(), depth, num_heads, mlp_ratio, ("attn", attn), options)
        super().__init__(_with_embedding(spikformer, patch_embed, pools, speds), **kwargs)
        self.cml = cml


def _with_embedding(spikformer: Architecture, patch_embed: str, pools: str, speds: Optional[str]) -> Architecture:
    if patch_embed == "sps":
        return spikformer
    if patch_embed != "speds" or pools not in _SPEDS:
        raise ValueError(
            f'patch_embed={patch_embed!r}, pools={pools!r}: it must be "sps", or "speds" with pools of {list(_SPEDS)}'
        )
    name = _SPEDS[pools][0] if speds is None else speds
    if name not in _SPEDS[pools]:
        raise ValueError(
            f"speds={speds!r} must be one of {list(_SPEDS[pools])}, whose stride is that of pools={pools!r}"
        )
    (stage,) = spikformer.stages
    widths = (stage.dim // 4, stage.dim // 2, stage.dim)
    hst = hierarchy(SPEDS[name], widths, (0, 0, 0), 1, 1.0, ("attn", "ssa"), {}, False)
    *first, last = hst.stages
    return hst._replace(stages=(*first, last._replace(blocks=stage.blocks)))


_STEM = (("proj_{}",), ("proj_{}1",), ("proj_{}2",), ("proj_{}3",), ("rpe_{}",))
_EVENT = "what the event models' code declares"
_CML_STEM = (("block1_{}",), ("block2_{}",), ("block3_{}",), ("block4_{}",), ("rpe_{}",))


def _parts(block: Any) -> list[Named | Stored]:
    *inputs, proj, fc1, fc2 = block_parts(block)
    norm1, norm2 = norms_of_block(block)
    return [*norm1, *inputs, *neuron_constants("attn.attn_lif"), proj, *norm2, fc1, fc2]


def checkpoint_filter_fn(state_dict: dict[str, Any], model: nn.Module) -> StateDict:
    """Turn a checkpoint of the authors' releases into this module's state dict; pass our own through unchanged.

    Takes plain state dicts and training checkpoints ("model" or "state_dict"), with or without DDP's "module." prefix:
    the ImageNet, CIFAR and event spellings of Spikformer and, for models with `cml`, of CML Spikformer, by name or by
    position, and STEP's Spikformer (github.com/Fancyssc/STEP), whose thresholds must be the model's. What the releases
    hold and never use (LayerNorms, `pos_embed`) is dropped. The number of classes and of input channels may differ from
    the model's: timm adapts those two afterwards.

    Raises:
        ValueError: Naming every missing, extra or misshapen tensor.
    """
    assert isinstance(model, Spikformer)
    if len(model.stages) > 1:  # no release has SPEDS
        return unwrap_checkpoint(state_dict)
    dim = model.num_features
    of_events = ([Stored("pos_embed", shape=(1, None, dim), kind=_EVENT)], layer_norm("norm", dim, _EVENT))
    stem = _CML_STEM if model.cml else _STEM
    return translate_flat(state_dict, model, stem, _parts, of_events, lambda tensors: without_constants(tensors, model))


_CIFAR: Mapping[str, Any] = {"pools": CIFAR_POOLS, "num_heads": 12, "qkv_bias": True}
_EVENTS = {"embed_dim": 256, "depth": 2, "num_heads": 16, "time_steps": 16, "speds": "events"}
_MILLIONS = {"8_384": 16.82, "8_512": 29.69, "8_768": 66.34, "4_384": 9.32, "4_256": 4.16, "2_384": 5.77}

_PLAIN = {
    **image_variants("spikformer", "Spikformer", _MILLIONS, _CIFAR),
    "spikformer_2_256_dvs": Variant(
        "Spikformer-2-256 for event cameras: 2.57 M parameters, T = 16.", {**_EVENTS, "scale": 0.25}
    ),
}
_CML = {
    f"{name}_cml": Variant(
        variant.text.replace("Spikformer", "CML Spikformer"), {**variant.args, "cml": True, "scale": 0.125}
    )
    for name, variant in _PLAIN.items()
}
_VARIANTS = _PLAIN | _CML

default_cfgs = generate_default_cfgs(
    flat_cfgs(
        {
            "paper_ids": "arXiv:2209.15425",
            "paper_name": "Spikformer: When Spiking Neural Network Meets Transformer",
            "origin_url": "https://github.com/ZK-Zhou/spikformer",
        },
        _PLAIN,
    )
    | flat_cfgs(
        {
            "paper_ids": ("arXiv:2209.15425", "arXiv:2305.05889"),
            "paper_name": "Enhancing the Performance of Transformer-based Spiking Neural Networks by SNN-optimized "
            "Downsampling with Precise Gradient Backpropagation",
            "origin_url": "https://github.com/zhouchenlin2096/Spikingformer-CML",
        },
        _CML,
    )
)


def _stages(args: Mapping[str, Any]) -> int:
    return 3 if args.get("patch_embed") == "speds" else 1


register_variants(__name__, Spikformer, checkpoint_filter_fn, _VARIANTS, _stages)
