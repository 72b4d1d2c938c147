"""Max-Former: Spiking Neural Networks Need High-Frequency Information.

Paper: https://arxiv.org/abs/2505.18608 (NeurIPS 2025)
Authors' code: https://github.com/bic-L/MaxFormer

Spiking neurons pass low frequencies and lose high ones. Max-Former is QKFormer's hierarchy with membrane shortcuts and
two changes that keep high frequencies: max pooling in the shortcuts of the later patch embeddings, and depth-wise
convolution in place of attention in the first two stages.
"""

from collections.abc import Sequence
from typing import Any, Union

from timm.models._registry import generate_default_cfgs, register_model
from torch import nn

from .architecture import Embedding, EmbedSpec, hierarchy
from .base import IMAGENET_CFG, SpikingTransformer
from .checkpoints import MAXFORMER_CHECKPOINTS, StateDict, UnitNames, translate_release, unwrap_checkpoint
from .loading import create

# Strides 2 | 4, 8, 16. The stem and the first embedding stride, the later ones pool in both branches.
EMBEDDING = Embedding(
    stem_pool=False,
    stem_stride=2,
    stages=(
        EmbedSpec((True, False), strided=True),
        EmbedSpec((True, False), pool_shortcut=True),
        EmbedSpec((True, False), pool_shortcut=True),
    ),
)


class MaxFormer(SpikingTransformer):
    """Max-Former, with membrane shortcuts throughout.

    Takes images [B, C, H, W], shown for `time_steps` steps, or event clips [B, T, C, H, W], which bring their own T.
    Each forward pass starts from rest, and no sample sees its batch mates.

    Args:
        mixer: Token mixer, a registered operator: depth-wise convolution with a kernel of 3, 5 or 7 ("dwc3", "dwc5",
            "dwc7"), spiking self-attention ("ssa"), ...; one, one per stage, or for a stage one per block.
        embed_dims: Width of each stage.
        depths: Blocks in each stage.
        num_heads: Attention heads, as `mixer`.
        mlp_ratio: MLP width relative to the stage's, as `mixer`.
        **kwargs: `in_chans`, `num_classes`, `global_pool`, `time_steps`, `neuron`, `neuron_args`, `operator_args`,
            `drop_rate`, `proj_drop_rate`, `drop_path_rate`, `device` and `dtype`, see `SpikingTransformer`.

    Raises:
        ValueError: For an unknown token mixer, or another argument outside its range.
    """

    def __init__(
        self,
        mixer: Union[str, Sequence[Any]] = ("dwc7", "dwc5", "ssa"),
        embed_dims: Sequence[int] = (96, 192, 384),
        depths: Sequence[int] = (1, 2, 7),
        num_heads: Union[int, Sequence[Any]] = 6,
        mlp_ratio: Union[float, Sequence[Any]] = 4.0,
        **kwargs: Any,
    ) -> None:
        operators = ("mixer", mixer)
        super().__init__(
            hierarchy(EMBEDDING, embed_dims, depths, num_heads, mlp_ratio, operators, {}, membrane_shortcut=True),
            **kwargs,
        )


_RELEASE_EMBEDS: tuple[tuple[UnitNames, ...], ...] = tuple(
    tuple((f"{unit}.embed_conv", f"{unit}.embed_bn") for unit in units)
    for units in (
        ("embed1", "embed2", "embed3", "embed4"),
        ("max_embed1", "embed1", "max_embed2"),
        ("max_embed1", "embed1", "max_embed2"),
    )
)


def checkpoint_filter_fn(state_dict: dict[str, Any], model: nn.Module) -> StateDict:
    """Turn a checkpoint of the authors' release into this module's state dict; pass our own through unchanged.

    Takes plain state dicts and training checkpoints ("model" or "state_dict"), with or without DDP's "module."
    prefix, by name or, where an older checkpoint's names differ from the release's code, by position. The number of
    classes and of input channels may differ from the model's: timm adapts those two afterwards.

    Raises:
        ValueError: If the tensors fit the model neither by name nor by position, with what is wrong.
    """
    assert isinstance(model, MaxFormer)
    return translate_release(unwrap_checkpoint(state_dict), model, _RELEASE_EMBEDS)


def _cfg(asset: str = "", **kwargs: Any) -> dict[str, Any]:
    """Config of a checkpoint from the authors' release, which states no licence."""
    return {
        "url": MAXFORMER_CHECKPOINTS + asset if asset else "",
        **IMAGENET_CFG,
        "paper_ids": "arXiv:2505.18608",
        "paper_name": "Spiking Neural Networks Need High-Frequency Information",
        "origin_url": "https://github.com/bic-L/MaxFormer",
        **kwargs,
    }


default_cfgs = generate_default_cfgs(
    {
        "maxformer_10_384.t4_in1k": _cfg("10-384-T4.pth.tar"),
        "maxformer_10_512.t4_in1k": _cfg("10-512-T4.pth.tar"),
        "maxformer_10_512.t1_in1k": _cfg("10-512-T1.pth.tar"),
        "maxformer_10_768.t4_in1k": _cfg("10-768-T4.pth.tar"),
        "maxformer_10_768.t1_in1k": _cfg("10-768-T1.pth.tar"),
        "test_maxformer.untrained": _cfg(input_size=(3, 64, 64), pool_size=(4, 4), crop_pct=1.0),
    }
)

# Time steps that a tag's weights were trained with; the model has them, too, unless the caller asks for others.
_TAG_ARGS = {
    "maxformer_10_384.t4_in1k": {"time_steps": 4},
    "maxformer_10_512.t4_in1k": {"time_steps": 4},
    "maxformer_10_512.t1_in1k": {"time_steps": 1},
    "maxformer_10_768.t4_in1k": {"time_steps": 4},
    "maxformer_10_768.t1_in1k": {"time_steps": 1},
}


def _create_maxformer(variant: str, pretrained: bool = False, **kwargs: Any) -> MaxFormer:
    return create(MaxFormer, variant, pretrained, checkpoint_filter_fn, _TAG_ARGS, **kwargs)


@register_model
def maxformer_10_384(pretrained: bool = False, **kwargs: Any) -> MaxFormer:
    """Max-Former-10-384 for ImageNet: 16.24 M parameters, T = 4."""
    model_args = {"embed_dims": (96, 192, 384), "depths": (1, 2, 7), "num_heads": 6}
    return _create_maxformer("maxformer_10_384", pretrained, **dict(model_args, **kwargs))


@register_model
def maxformer_10_512(pretrained: bool = False, **kwargs: Any) -> MaxFormer:
    """Max-Former-10-512 for ImageNet: 28.65 M parameters, T = 4."""
    model_args = {"embed_dims": (128, 256, 512), "depths": (1, 2, 7), "num_heads": 8}
    return _create_maxformer("maxformer_10_512", pretrained, **dict(model_args, **kwargs))


@register_model
def maxformer_10_768(pretrained: bool = False, **kwargs: Any) -> MaxFormer:
    """Max-Former-10-768 for ImageNet: 63.99 M parameters, T = 4."""
    model_args = {"embed_dims": (192, 384, 768), "depths": (1, 2, 7), "num_heads": 12}
    return _create_maxformer("maxformer_10_768", pretrained, **dict(model_args, **kwargs))


@register_model
def test_maxformer(pretrained: bool = False, **kwargs: Any) -> MaxFormer:
    """A tiny Max-Former with every kind of layer, for tests."""
    model_args = {"embed_dims": (16, 32, 64), "depths": (1, 1, 2), "num_heads": 4}
    return _create_maxformer("test_maxformer", pretrained, **dict(model_args, **kwargs))
