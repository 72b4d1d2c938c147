"""AutoST: Training-free Neural Architecture Search for Spiking Transformers.

Paper: https://arxiv.org/abs/2307.00293 (ICASSP 2024)
Authors' code: https://github.com/AlexandreWANG915/AutoST

The network that is searched: membrane shortcuts, parametric neurons, and for each block its own heads and MLP ratio.
The search is `timm_qkformer.search`; the architectures that the authors found are not published.
"""

from collections.abc import Iterator, Sequence
from typing import Any, Union

from timm.models._registry import generate_default_cfgs
from torch import nn

from ..layers import PositionSpec
from ..neurons import NeuronLayer
from .architecture import flat
from .base import SpikingTransformer
from .checkpoints import StateDict
from .flat import CIFAR_POOLS, flat_cfgs, splitting
from .flat_checkpoints import Named, translate_flat
from .variants import Variant, register_variants


class AutoST(SpikingTransformer):
    """The network of AutoST.

    Takes images [B, C, H, W], shown for `time_steps` steps, or event clips [B, T, C, H, W], which bring their own T.
    Each forward pass starts from rest, and no sample sees its batch mates.

    Args:
        pools: Which of the four convolutions halve the size. The last one has no neurons, and what it gives is the
            input of the position unit.
        attn, embed_dim, depth: See `Spikformer`.
        num_heads: Attention heads; one number, or one for each block.
        mlp_ratio: MLP width relative to `embed_dim`, likewise.
        neuron: See `SpikingTransformer`.
        **kwargs: See `SpikingTransformer`.

    Raises:
        ValueError: For heads or ratios of another number of blocks, or another argument outside its range.
    """

    def __init__(
        self,
        pools: str = CIFAR_POOLS,
        attn: Union[str, Sequence[str]] = "ssa",
        embed_dim: int = 384,
        depth: int = 4,
        num_heads: Union[int, Sequence[int]] = 8,
        mlp_ratio: Union[float, Sequence[float]] = 4.0,
        neuron: Union[str, NeuronLayer] = "plif",
        **kwargs: Any,
    ) -> None:
        *first, last = splitting(embed_dim, pools, "spikes")
        units = (*first, last._replace(fires=False, pool="currents" if last.pool else ""))
        blocks = (depth, num_heads, mlp_ratio, ("attn", attn), {"": {"qkv_bias": True}}, True)
        super().__init__(flat(units, PositionSpec(fires=False), *blocks), neuron=neuron, **kwargs)


_STEM = (("proj_{}",), ("proj_{}1",), ("proj_{}2",), ("proj_{}3",), ("rpe_{}",))


def _parts(block: Any) -> Iterator[Named]:
    for part in block.attn.inputs:
        yield [f"attn.{part}_{{}}"], f"attn.{part}"
        yield [f"attn.{part}_{{}}"], f"attn.{part}.neuron"
    for name in block.attn.inner_neurons:
        yield [f"attn.{name.removesuffix('_neuron')}_{{}}"], f"attn.{name}"
    yield ["attn.proj_{}"], "attn.proj"
    yield ["attn.{}"], "neuron1"
    yield ["mlp.fc1_{}"], "mlp.fc1"
    yield ["mlp.fc1_{}"], "neuron2"  # neurons stand before the layer whose name they have
    yield ["mlp.fc2_{}"], "mlp.fc2"
    yield ["mlp.fc2_{}"], "mlp.fc1.neuron"


def checkpoint_filter_fn(state_dict: dict[str, Any], model: nn.Module) -> StateDict:
    """As `spikformer.checkpoint_filter_fn`, for the authors' release.

    Raises:
        ValueError: Naming every missing, extra or misshapen tensor.
    """
    assert isinstance(model, AutoST)
    return translate_flat(state_dict, model, _STEM, _parts)


_VARIANTS = {
    "autost_4_384": Variant("AutoST's network for CIFAR, 4 blocks alike: 9.32 M parameters, T = 4.", {}),
    "autost_4_256": Variant(
        "AutoST's network for CIFAR, 4 blocks that differ: 4.16 M parameters, T = 4.",
        {"embed_dim": 256, "num_heads": (4, 8, 8, 4), "mlp_ratio": (3, 4, 5, 4)},
    ),
    "test_autost": Variant(
        "A tiny network of AutoST, for tests.",
        {"embed_dim": 32, "depth": 2, "num_heads": (4, 8), "mlp_ratio": (2, 3)},
    ),
}

default_cfgs = generate_default_cfgs(
    flat_cfgs(
        {
            "paper_ids": "arXiv:2307.00293",
            "paper_name": "AutoST: Training-free Neural Architecture Search for Spiking Transformers",
            "origin_url": "https://github.com/AlexandreWANG915/AutoST",
        },
        {name: v._replace(args={"pools": CIFAR_POOLS, **v.args}) for name, v in _VARIANTS.items()},
    )
)

register_variants(__name__, AutoST, checkpoint_filter_fn, _VARIANTS)
