"""SEMM: Spiking Experts Mixture Mechanism, on Spikformer.

Paper: "Spiking Transformer with Experts Mixture" (NeurIPS 2024)
Code: https://github.com/Fancyssc/STEP, the only public one known

Experts in the place of self-attention's heads, and an MLP in which one half of the hidden layer, convolved, gates the
other.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Union

from timm.models._registry import generate_default_cfgs
from torch import Tensor, nn

from ..execution.packing import Range
from ..layers import MeanReadout, PositionSpec, SpikingConv, SpikingMlp, register_mlp
from ..neurons import NeuronLayer
from ..operators.experts import ExpertsAttention
from .architecture import flat
from .base import SpikingTransformer
from .checkpoints import StateDict, check_thresholds, take_thresholds
from .flat import CIFAR_POOLS, IMAGENET_POOLS, flat_cfgs, splitting
from .flat_checkpoints import Named, block_parts, translate_flat
from .positions import Stored, neuron_constants
from .variants import Variant, register_variants


@register_mlp("experts")
class ExpertsMlp(SpikingMlp):
    """LIF BN fc2 (LIF(BN(dw u1)) * u2), where u1 and u2 are the halves of u = LIF BN fc1 and dw is a depth-wise 3x3."""

    mixes = True
    parts = 2
    dw_bias = False

    def build_mixer(self, hidden_dim: int, hidden: Range, neuron_layer: NeuronLayer, **dd: Any) -> tuple[int, Range]:
        if hidden_dim % self.parts:
            raise ValueError(f"hidden_dim={hidden_dim} must be even: the MLP of experts halves it")
        half = hidden_dim // self.parts
        args: dict[str, Any] = {"groups": half, "input_range": hidden, "neuron_layer": neuron_layer, **dd}
        self.dw = SpikingConv(half, half, 3, bias=self.dw_bias, **args)
        return half, self.dw.output_range.times(hidden)

    def mix(self, x: Tensor) -> Tensor:
        gate, kept = x.chunk(2, dim=2)
        return self.dw(gate) * kept


@register_mlp("experts_bias")
class BiasedExpertsMlp(ExpertsMlp):
    """`ExpertsMlp` whose depth-wise convolution has a bias."""

    dw_bias = True


class BatchReadout(MeanReadout):
    """Mean over T and over the samples: one map for the whole batch, as STEP's ImageNet model has it."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean((0, 1)).unsqueeze(0)


class SEMM(SpikingTransformer):
    """Spikformer with experts.

    Takes images [B, C, H, W], shown for `time_steps` steps, or event clips [B, T, C, H, W], which bring their own T.
    Each forward pass starts from rest, and no sample sees its batch mates.

    Args:
        pools, attn, embed_dim, depth: See `Spikformer`.
        mlp_ratio: Hidden channels relative to `embed_dim`; None: (embed_dim // 3) * 16 of them, as STEP's ImageNet
            model has.
        qkv_bias, scale, norm, router_misread, expert_dim: See `ExpertsAttention`.
        dw_bias: Give the MLP's depth-wise convolution a bias.
        num_heads: Of other token mixers than experts.
        batch_coupled: Reproduce STEP's ImageNet model, which answers with one row for a whole batch, the mean of the
            samples' own.
        **kwargs: See `SpikingTransformer`.

    Raises:
        ValueError: For an odd number of hidden channels, or another argument outside its range.
    """

    def __init__(
        self,
        pools: str = IMAGENET_POOLS,
        attn: Union[str, Sequence[str]] = "experts",
        embed_dim: int = 512,
        depth: int = 8,
        mlp_ratio: Union[float, Sequence[float], None] = None,
        qkv_bias: bool = False,
        scale: float = 1.0,
        norm: bool = False,
        router_misread: bool = False,
        expert_dim: int = 96,
        dw_bias: bool = True,
        num_heads: Union[int, Sequence[int]] = 8,
        batch_coupled: bool = False,
        **kwargs: Any,
    ) -> None:
        units = splitting(embed_dim, pools, "spikes")
        ratio = (embed_dim // 3 * 16 + 0.5) / embed_dim if mlp_ratio is None else mlp_ratio  # rounded down again
        experts = {"scale": scale, "norm": norm, "router_misread": router_misread, "expert_dim": expert_dim}
        options: dict[str, Mapping[str, Any]] = {"": {"qkv_bias": qkv_bias}, "experts": experts}
        mlp = "experts_bias" if dw_bias else "experts"
        skeleton = flat(units, PositionSpec(), depth, num_heads, ratio, ("attn", attn), options, mlp=mlp)
        super().__init__(skeleton, **kwargs)
        if batch_coupled:
            self.readout = BatchReadout()


_STEM = (("proj_{}",), ("proj_{}1",), ("proj_{}2",), ("proj_{}3",), ("rpe_{}",))


def _parts(block: Any) -> Iterator[Named | Stored]:
    *attention, fc1, fc2 = block_parts(block)
    if isinstance(block.attn, ExpertsAttention):
        yield from _experts(block.attn)
    else:
        yield from attention
    yield from (fc1, (["mlp.dw_{}"], "mlp.dw"), fc2)


def _experts(mixer: Any) -> Iterator[Named | Stored]:
    idle = type(mixer.k.bn) is nn.Identity  # the ImageNet model's code, which declares the projection last
    proj: Named = (["attn.proj_{}"], "attn.proj")
    for part in ("k", "v"):
        yield [f"attn.{part}_{{}}"], f"attn.{part}"
    if not idle:
        yield proj
    yield [{"conv": "attn.router1", "bn": "attn.router2", "lif": "attn.router3"}], "attn.r"
    for e in range(4):
        yield [f"attn.ff_list.{e}.unit_{{}}"], f"attn.q{e + 1}"
    for e in range(4):
        yield from neuron_constants(f"attn.lif_list.{e}")
    if idle:
        yield proj


def checkpoint_filter_fn(state_dict: dict[str, Any], model: nn.Module) -> StateDict:
    """As `spikformer.checkpoint_filter_fn`, for STEP's CIFAR and ImageNet models.

    Batch norms that a model's K and V do without are dropped, as are constants of surrogates.

    Raises:
        ValueError: Naming every missing, extra or misshapen tensor, or thresholds that the model has not.
    """
    assert isinstance(model, SEMM)
    return translate_flat(state_dict, model, _STEM, _parts, take_constants=_without_constants)


def _without_constants(state_dict: StateDict) -> StateDict:
    tensors, thresholds = take_thresholds(state_dict)
    check_thresholds(thresholds)
    return tensors


_CIFAR: dict[str, Any] = {
    "pools": CIFAR_POOLS,
    "depth": 4,
    "mlp_ratio": 4.0,
    "qkv_bias": True,
    "scale": 0.125,
    "norm": True,
    "router_misread": True,
    "dw_bias": False,
}

_VARIANTS = {
    "semm_8_384": Variant("SEMM-8-384 for ImageNet: 16.04 M parameters, T = 4.", {"embed_dim": 384}),
    "semm_8_512": Variant("SEMM-8-512 for ImageNet: 27.54 M parameters, T = 4.", {}),
    "semm_8_768": Variant("SEMM-8-768 for ImageNet: 60.07 M parameters, T = 4.", {"embed_dim": 768}),
    "semm_4_384": Variant(
        "SEMM-4-384 for CIFAR: 7.74 M parameters, T = 4. It misreads its router as STEP's code does, see "
        "`router_misread`.",
        {**_CIFAR, "embed_dim": 384},
    ),
    "test_semm": Variant("A tiny SEMM, for tests.", {**_CIFAR, "depth": 2, "embed_dim": 32, "expert_dim": 8}),
}

default_cfgs = generate_default_cfgs(
    flat_cfgs(
        {"paper_name": "Spiking Transformer with Experts Mixture", "origin_url": "https://github.com/Fancyssc/STEP"},
        _VARIANTS,
    )
)

register_variants(__name__, SEMM, checkpoint_filter_fn, _VARIANTS)
