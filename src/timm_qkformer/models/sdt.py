"""Spike-driven Transformer (SDT, "V1").

Paper: https://arxiv.org/abs/2307.01694 (NeurIPS 2023)
Authors' code: https://github.com/BICLab/Spike-Driven-Transformer

Spike-driven self-attention, which masks channels and multiplies no matrices, and shortcuts that add membrane
potentials. Neurons stand in front of the classifier.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Union

from timm.models._registry import generate_default_cfgs
from torch import nn

from ..layers import PositionSpec
from .architecture import flat
from .base import SpikingTransformer
from .checkpoints import StateDict
from .flat import CIFAR_POOLS, IMAGENET_POOLS, flat_cfgs, splitting
from .flat_checkpoints import Named, block_parts, translate_flat
from .positions import Stored
from .variants import Variant, register_variants


class SpikeDrivenTransformer(SpikingTransformer):
    """Spike-driven Transformer: a chain of convolutions, then blocks of spike-driven self-attention.

    Takes images [B, C, H, W], shown for `time_steps` steps, or event clips [B, T, C, H, W], which bring their own T.
    Each forward pass starts from rest, and no sample sees its batch mates.

    Args:
        pools: Which of the four convolutions halve the size: "1111" (ImageNet), "0011" (CIFAR, CIFAR10-DVS), "0111"
            (DVS128 Gesture). The first three pool spikes, the fourth currents.
        attn, embed_dim, depth, num_heads, mlp_ratio: See `Spikformer`.
        dvs_mode: Max pooling in spike-driven self-attention, see there.
        **kwargs: See `SpikingTransformer`.

    Raises:
        ValueError: For a width that is no multiple of 8, or another argument outside its range.
    """

    def __init__(
        self,
        pools: str = IMAGENET_POOLS,
        attn: Union[str, Sequence[str]] = "sdsa",
        embed_dim: int = 512,
        depth: int = 8,
        num_heads: Union[int, Sequence[int]] = 8,
        mlp_ratio: Union[float, Sequence[float]] = 4.0,
        dvs_mode: bool = False,
        **kwargs: Any,
    ) -> None:
        *first, last = splitting(embed_dim, pools, "spikes")
        last = last._replace(fires=False, pool="currents" if last.pool else "")
        position = PositionSpec(fires_before=True, fires=False)
        blocks = (depth, num_heads, mlp_ratio, ("attn", attn), {"sdsa": {"dvs_mode": dvs_mode}})
        super().__init__(flat((*first, last), position, *blocks, True, membrane_readout=True), **kwargs)


_STEM = (("proj_{}",), ("proj_{}1",), ("proj_{}2",), ("proj_{}3",), ("rpe_{}",))


def _parts(block: Any) -> list[Named | Stored]:
    *inputs, proj, fc1, fc2 = block_parts(block)
    heads = block.attn.num_heads
    talking = Stored("attn.talking_heads.weight", shape=(heads, heads, 1), kind="talking heads")
    return [*inputs, talking, proj, fc1, fc2]


def checkpoint_filter_fn(state_dict: dict[str, Any], model: nn.Module) -> StateDict:
    """As `spikformer.checkpoint_filter_fn`, for the authors' release, whose talking heads are never used and dropped.

    Raises:
        ValueError: Naming every missing, extra or misshapen tensor.
    """
    assert isinstance(model, SpikeDrivenTransformer)
    return translate_flat(state_dict, model, _STEM, _parts)


_CIFAR: Mapping[str, Any] = {"pools": CIFAR_POOLS, "depth": 2}

_VARIANTS = {
    "sdt_8_384": Variant("SDT-8-384 for ImageNet: 16.82 M parameters, T = 4.", {"embed_dim": 384}),
    "sdt_6_512": Variant("SDT-6-512 for ImageNet: 23.37 M parameters, T = 4.", {"depth": 6}),
    "sdt_8_512": Variant("SDT-8-512 for ImageNet: 29.69 M parameters, T = 4.", {}),
    "sdt_10_512": Variant("SDT-10-512 for ImageNet: 36.01 M parameters, T = 4.", {"depth": 10}),
    "sdt_8_768": Variant("SDT-8-768 for ImageNet: 66.34 M parameters, T = 4.", {"embed_dim": 768}),
    "sdt_2_512": Variant("SDT-2-512 for CIFAR: 10.23 M parameters, T = 4.", _CIFAR),
    "sdt_2_256": Variant("SDT-2-256 for CIFAR: 2.57 M parameters, T = 4.", {**_CIFAR, "embed_dim": 256}),
    "sdt_2_256_dvs": Variant(
        "SDT-2-256 for CIFAR10-DVS at 64 x 64 pixels: 2.57 M parameters, T = 10.",
        {**_CIFAR, "embed_dim": 256, "dvs_mode": True, "time_steps": 10},
        input_size=64,
    ),
    "sdt_2_256_gesture": Variant(
        "SDT-2-256 for DVS128 Gesture: 2.57 M parameters, T = 16.",
        {"pools": "0111", "depth": 2, "embed_dim": 256, "time_steps": 16},
    ),
    "test_sdt": Variant("A tiny SDT, for tests.", {**_CIFAR, "embed_dim": 32, "num_heads": 4}),
    "test_sdt_dvs": Variant(
        "A tiny SDT with pooling in its attention, for tests.",
        {**_CIFAR, "embed_dim": 32, "num_heads": 4, "dvs_mode": True},
    ),
}

default_cfgs = generate_default_cfgs(
    flat_cfgs(
        {
            "paper_ids": "arXiv:2307.01694",
            "paper_name": "Spike-driven Transformer",
            "origin_url": "https://github.com/BICLab/Spike-Driven-Transformer",
        },
        _VARIANTS,
    )
)

register_variants(__name__, SpikeDrivenTransformer, checkpoint_filter_fn, _VARIANTS)
