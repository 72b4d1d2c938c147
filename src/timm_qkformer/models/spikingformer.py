"""Spikingformer: Spike-driven Residual Learning for Transformer-based Spiking Neural Network; and with CML.

Paper: https://arxiv.org/abs/2304.11954
Authors' code: https://github.com/zhouchenlin2096/Spikingformer
CML: https://arxiv.org/abs/2305.05889, https://github.com/zhouchenlin2096/Spikingformer-CML

Spikformer with neurons in front of every weight layer and none after additions: shortcuts add membrane potentials, and
no convolution but the first sees anything but spikes. The head sees their means. CML pools before the neurons.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Union

from timm.models._registry import generate_default_cfgs
from torch import nn

from ..layers import UnitSpec
from .architecture import flat
from .base import SpikingTransformer
from .checkpoints import StateDict
from .flat import CIFAR_POOLS, IMAGENET_POOLS, flat_cfgs, image_variants, splitting
from .flat_checkpoints import Named, block_parts, norms_of_block, translate_flat
from .positions import Stored
from .variants import Variant, register_variants


class Spikingformer(SpikingTransformer):
    """Spikingformer: convolutions that split the picture into patches, then blocks that add membrane potentials.

    Takes what `Spikformer` takes, and has its properties.

    Args:
        pools: Which of the first four convolutions halve the size: "1111" (ImageNet, events) or "0011" (CIFAR).
        attn, embed_dim, depth, num_heads, mlp_ratio: See `Spikformer`.
        cml: Pool before the neurons.
        **kwargs: See `SpikingTransformer`.

    Raises:
        ValueError: For other `pools` than four digits 0 or 1, or another argument outside its range.
    """

    def __init__(
        self,
        pools: str = IMAGENET_POOLS,
        attn: Union[str, Sequence[str]] = "ssa",
        cml: bool = False,
        embed_dim: int = 512,
        depth: int = 8,
        num_heads: Union[int, Sequence[int]] = 8,
        mlp_ratio: Union[float, Sequence[float]] = 4.0,
        **kwargs: Any,
    ) -> None:
        units = (*splitting(embed_dim, pools, "currents" if cml else "spikes"), UnitSpec(embed_dim, fires=False))
        architecture = flat(
            units, None, depth, num_heads, mlp_ratio, ("attn", attn), options={}, membrane_shortcut=True
        )
        super().__init__(architecture, **kwargs)
        self.stem_names = _CIFAR_STEM if pools == CIFAR_POOLS and not cml else _STEM


_STEM = (("proj_{}",), *((f"proj{i}_{{}}",) for i in range(1, 5)))
_CIFAR_STEM = tuple((f"block{i}_{{}}",) for i in range(5))  # of Spikingformer; CML's has the names of all others


def _parts(block: Any) -> list[Named | Stored]:
    *attention, fc1, fc2 = block_parts(block)
    norm1, norm2 = norms_of_block(block)
    return [*norm1, *attention, *norm2, fc1, fc2]


def checkpoint_filter_fn(state_dict: dict[str, Any], model: nn.Module) -> StateDict:
    """As `spikformer.checkpoint_filter_fn`, for the releases of Spikingformer and CML Spikingformer.

    Raises:
        ValueError: Naming every missing, extra or misshapen tensor.
    """
    assert isinstance(model, Spikingformer)
    return translate_flat(state_dict, model, model.stem_names, _parts)


_CIFAR: Mapping[str, Any] = {"pools": CIFAR_POOLS, "num_heads": 12}
_EVENTS = {"embed_dim": 256, "depth": 2, "num_heads": 16, "time_steps": 16}

# The release's 4-384 has 8 heads for CIFAR-100.
_MILLIONS = {"8_384": 16.82, "8_512": 29.69, "8_768": 66.34, "4_384": 9.32, "4_256": 4.15, "2_384": 5.76}

_PLAIN = {
    **image_variants("spikingformer", "Spikingformer", _MILLIONS, _CIFAR),
    "spikingformer_2_256_dvs": Variant(
        "Spikingformer-2-256 for event cameras: 2.57 M parameters, T = 16, tau = 1.5.",
        {**_EVENTS, "neuron_args": {"tau": 1.5}},
    ),
}
_CML = {
    f"{name}_cml": Variant(variant.text.replace("Spikingformer", "CML Spikingformer", 1), {**variant.args, "cml": True})
    for name, variant in _PLAIN.items()
}
_CML["spikingformer_2_256_dvs_cml"] = Variant(
    "CML Spikingformer-2-256 for event cameras: 2.57 M parameters, T = 16, tau = 1.75.",
    {**_EVENTS, "neuron_args": {"tau": 1.75}, "cml": True},
)

default_cfgs = generate_default_cfgs(
    flat_cfgs(
        {
            "paper_ids": "arXiv:2304.11954",
            "paper_name": "Spikingformer: Spike-driven Residual Learning for Transformer-based Spiking Neural Network",
            "origin_url": "https://github.com/zhouchenlin2096/Spikingformer",
        },
        _PLAIN,
    )
    | flat_cfgs(
        {
            "paper_ids": ("arXiv:2304.11954", "arXiv:2305.05889"),
            "paper_name": "Spikingformer with Convolution-based Max-pooling LIF",
            "origin_url": "https://github.com/zhouchenlin2096/Spikingformer-CML",
        },
        _CML,
    )
)

register_variants(__name__, Spikingformer, checkpoint_filter_fn, _PLAIN | _CML)
