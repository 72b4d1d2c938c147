"""What the papers of flat spiking transformers share: their chains of convolutions and their pretrained configs."""

from collections.abc import Mapping
from typing import Any

from ..layers import UnitSpec
from .base import CIFAR10_CFG, EVENTS_CFG, IMAGENET_CFG
from .variants import Variant

IMAGENET_POOLS, CIFAR_POOLS = "1111", "0011"


def splitting(embed_dim: int, pools: str, where: str) -> tuple[UnitSpec, ...]:
    """Four convolutions of an eighth, a quarter, half and all of the channels; `pools` has a 1 for each that halves.

    Args:
        embed_dim: Channels of the last.
        pools: Such as "1111" (ImageNet, stride 16) and "0011" (CIFAR, stride 4).
        where: Where they pool, see `UnitSpec`.

    Raises:
        ValueError: For other `pools` than four digits 0 or 1, or a width that has no eighth.
    """
    if not isinstance(pools, str) or len(pools) != 4 or set(pools) - set("01"):
        raise ValueError(f'pools={pools!r} must be four digits, 1 for each convolution that pools, such as "0011"')
    if type(embed_dim) is not int or embed_dim < 8 or embed_dim % 8:
        raise ValueError(f"embed_dim={embed_dim!r} must be a multiple of 8: convolutions have an eighth of it and more")
    widths = (embed_dim // 8, embed_dim // 4, embed_dim // 2, embed_dim)
    return tuple(UnitSpec(dim, where if pool == "1" else "") for dim, pool in zip(widths, pools, strict=True))


def flat_cfgs(paper: Mapping[str, Any], variants: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Configs of variants that have no weights, by name and tag: what they are fed follows from their arguments.

    Args:
        paper: `paper_ids`, `paper_name` and `origin_url`.
        variants: By registered name; see `Variant`.
    """
    cfgs = {}
    for name, variant in variants.items():
        stride = 2 ** variant.args.get("pools", IMAGENET_POOLS).count("1")
        if name.startswith("test_"):
            cfg = {**IMAGENET_CFG, "input_size": (3, 32, 32), "crop_pct": 1.0}
        elif "time_steps" in variant.args:
            cfg = {**EVENTS_CFG, "input_size": (2, *[variant.input_size or 128] * 2)}
        else:
            cfg = CIFAR10_CFG if stride == 4 else IMAGENET_CFG
        side = cfg["input_size"][1] // stride
        cfgs[f"{name}.untrained"] = {"url": "", **cfg, "pool_size": (side, side), **paper}
    return cfgs


# Blocks and width; CIFAR's 256 channels have 8 heads, 12 do not divide them.
_IMAGENET_SIZES = ((8, 384), (8, 512), (8, 768))
_CIFAR_SIZES = ((4, 384), (4, 256), (2, 384))


def image_variants(
    name: str, paper: str, millions: Mapping[str, float], cifar: Mapping[str, Any]
) -> dict[str, Variant]:
    """The sizes for images that Spikformer and Spikingformer have, and a tiny one.

    Args:
        name: What registered names begin with.
        paper: What the paper calls the model.
        millions: Parameters of each size, for its docstring.
        cifar: Arguments of the CIFAR models.
    """
    variants = {}
    for depth, width in (*_IMAGENET_SIZES, *_CIFAR_SIZES):
        size, small = f"{depth}_{width}", (depth, width) in _CIFAR_SIZES
        args = {**(cifar if small else {}), "embed_dim": width, "depth": depth}
        if small and width % 12:
            args["num_heads"] = 8
        data = "CIFAR" if small else "ImageNet"
        text = f"{paper}-{depth}-{width} for {data}: {millions[size]} M parameters, T = 4."
        variants[f"{name}_{size}"] = Variant(text, args)
    tiny = {**cifar, "embed_dim": 32, "depth": 2, "num_heads": 4}
    return {**variants, f"test_{name}": Variant(f"A tiny {paper}, for tests.", tiny)}
