"""TIM: An Efficient Temporal Interaction Module for Spiking Transformer.

Paper: https://arxiv.org/abs/2401.11687 (IJCAI 2024)
Authors' code: https://github.com/BrainCog-X/Brain-Cog, examples/TIM

Spikformer for event cameras whose queries remember earlier time steps.
"""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Union

from timm.models._input import update_model_args
from timm.models._registry import generate_default_cfgs
from torch import nn

from ..layers import PositionSpec
from ..operators.tim import TemporalInteractionAttention
from .architecture import flat
from .base import SpikingTransformer
from .checkpoints import StateDict, check_thresholds, take_thresholds
from .flat import IMAGENET_POOLS, flat_cfgs, splitting
from .flat_checkpoints import Named, block_parts, norms_of_block, translate_flat
from .positions import Stored, neuron_constants
from .variants import Variant, register_variants


class TIM(SpikingTransformer):
    """Spikformer with temporal interaction.

    Takes images [B, C, H, W], shown for `time_steps` steps, or event clips [B, T, C, H, W], which bring their own T.
    Each forward pass starts from rest, and no sample sees its batch mates.

    Args:
        pools, attn, embed_dim, depth, num_heads, mlp_ratio: See `Spikformer`.
        scale: Scale of spiking self-attention.
        tokens: Tokens that the interaction has weights for: 16 for 64 x 64 pixels. Others get them interpolated.
        alpha: Share of what earlier time steps say.
        thresholds: Of the interaction's two neurons and of the one after attention: (0.3, 0.5, 0.5) as meant,
            (1, 1, 1) as released; see `TemporalInteractionAttention`.
        **kwargs: See `SpikingTransformer`.

    Raises:
        ValueError: For `tokens`, `alpha` or another argument outside its range.
    """

    def __init__(
        self,
        pools: str = IMAGENET_POOLS,
        attn: Union[str, Sequence[str]] = "tim",
        embed_dim: int = 256,
        depth: int = 2,
        num_heads: Union[int, Sequence[int]] = 16,
        mlp_ratio: Union[float, Sequence[float]] = 4.0,
        scale: float = 0.25,
        tokens: int = 16,
        alpha: float = 0.5,
        thresholds: Sequence[float] = (0.3, 0.5, 0.5),
        **kwargs: Any,
    ) -> None:
        tim = {"tokens": tokens, "alpha": alpha, "thresholds": thresholds, "scale": scale}
        options: dict[str, Mapping[str, Any]] = {"": {"proj_bias": False}, "tim": tim, "ssa": {"scale": scale}}
        units, operators = splitting(embed_dim, pools, "spikes"), ("attn", attn)
        super().__init__(flat(units, PositionSpec(), depth, num_heads, mlp_ratio, operators, options), **kwargs)

    def set_thresholds(self, thresholds: Sequence[float]) -> None:
        """Give the interaction's neurons and the one after attention other thresholds, see `thresholds`."""
        for module in self.modules():
            if isinstance(module, TemporalInteractionAttention):
                module.set_thresholds(thresholds)
        # So that timm saves them with the model; they are those of `operator_args`, too.
        given: Mapping[str, Mapping[str, Any]] = getattr(self, "_model_args", {}).get("operator_args") or {}
        kept = {
            name: {k: v for k, v in args.items() if name.lower() != "tim" or k != "thresholds"}
            for name, args in given.items()
        }
        update_model_args(self, thresholds=tuple(thresholds), **({"operator_args": kept} if kept else {}))


_STEM = (("proj_{}",), ("proj_{}1",), ("proj_{}2",), ("proj_{}3",), ("rpe_{}",))
_OWN = (
    "attn.TIM.in_lif",
    "attn.TIM.out_lif",
    "attn.attn_lif",
)  # neurons with thresholds of their own, in the order of ours
_IDLE = "attn.res_lif"


def _parts(block: Any) -> list[Named | Stored]:
    *inputs, proj, fc1, fc2 = block_parts(block)
    norm1, norm2 = norms_of_block(block)
    *interaction, attention = map(neuron_constants, _OWN)
    parts: list[Named | Stored] = [*norm1, *inputs, *neuron_constants(_IDLE), *attention, proj]
    if isinstance(block.attn, TemporalInteractionAttention):
        parts.append((["attn.TIM.interactor"], "attn.interaction"))
        for constants in interaction:
            parts += constants
    return [*parts, *norm2, fc1, fc2]


def checkpoint_filter_fn(state_dict: dict[str, Any], model: nn.Module) -> StateDict:
    """As `spikformer.checkpoint_filter_fn`, for the authors' release.

    Thresholds that a checkpoint holds are the model's from then on, and a release's file without any is warned of; its
    surrogates' constants are dropped.

    Raises:
        ValueError: Naming every missing, extra or misshapen tensor, or thresholds that the model has not.
    """
    assert isinstance(model, TIM)
    return translate_flat(
        state_dict, model, _STEM, _parts, take_constants=lambda tensors: _set_thresholds(tensors, model)
    )


def _set_thresholds(state_dict: StateDict, model: TIM) -> StateDict:
    """Take the thresholds out of a checkpoint and give them to the model."""
    tensors, thresholds = take_thresholds(state_dict)
    own = [{value for name, value in thresholds.items() if name.endswith(end)} for end in _OWN]
    check_thresholds({n: v for n, v in thresholds.items() if not n.endswith((*_OWN, _IDLE))})
    if all(len(values) == 1 for values in own):
        model.set_thresholds([values.pop() for values in own])
    elif any(own):
        raise ValueError(f"the checkpoint's blocks have other thresholds each, or lack some: {_OWN} are {own}")
    elif any(".TIM." in name for name in tensors):
        warnings.warn(
            "the file is the release's, which stores its neurons' thresholds, but holds none: the model keeps its own "
            "(its argument `thresholds`)",
            stacklevel=2,
        )
    return tensors


_VARIANTS = {
    "tim_2_256": Variant(
        "TIM-2-256 for event cameras, 64 px: 2.57 M parameters with 10 classes, T = 10.",
        {"time_steps": 10},
        input_size=64,
    ),
    "test_tim": Variant("A tiny TIM, for tests.", {"embed_dim": 32, "num_heads": 4, "pools": "0011", "tokens": 64}),
}

default_cfgs = generate_default_cfgs(
    flat_cfgs(
        {
            "paper_ids": "arXiv:2401.11687",
            "paper_name": "TIM: An Efficient Temporal Interaction Module for Spiking Transformer",
            "origin_url": "https://github.com/BrainCog-X/Brain-Cog",
        },
        _VARIANTS,
    )
)

register_variants(__name__, TIM, checkpoint_filter_fn, _VARIANTS)
