"""All pictures of what attention layers do with one sample, and which layers they are of."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Optional

from torch import nn

from .attention import AttentionRecord, attention_layers
from .names import place_of
from .pictures import Array, draw_channel_masks, draw_query_key, draw_token_masks

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["QUERY_KEY", "draw_attention", "select_layers"]

QUERY_KEY = "query-key"  # beside names of layers


def select_layers(model: nn.Module, stage: Optional[int] = None, block: Optional[int] = None) -> dict[str, str]:
    """Attention layers, kinds by name, of one stage or block (counted from 1).

    Without either, those with Q-K attention or, in a model without it, every attention layer.

    Raises:
        ValueError: If there are none.
    """
    layers = attention_layers(model)
    if not layers:
        raise ValueError(f"{type(model).__name__} has no Q-K or spiking self-attention to draw")
    if stage is None and block is None:
        return {name: kind for name, kind in layers.items() if kind != "ssa"} or layers

    places = {name: place_of(name)[1:] for name in layers}
    chosen = {
        name: layers[name] for name, place in places.items() if stage in (None, place[0]) and block in (None, place[1])
    }
    if not chosen:
        wanted = " and ".join(
            f"{key}={value}" for key, value in (("stage", stage), ("block", block)) if value is not None
        )
        raise ValueError(f"{wanted} (counted from 1) has no attention layer; there are {', '.join(layers)}")
    return chosen


def draw_attention(records: Sequence[AttentionRecord], pictures: Array, title: str = "") -> dict[str, "Figure"]:
    """The masks of each layer under its name and, under `QUERY_KEY`, one picture of Q, mask, K and X' as in Fig. 3.

    Args:
        records: Of a batch of one; those without a mask are not on that picture.
        pictures: The sample, [1, S, H, W, 3], see `input_pictures`.
        title: First line of every picture's title.
    """
    figures = {
        record.name: draw_channel_masks(record, title=title)
        if record.kind == "qkca"
        else draw_token_masks(record, pictures, title=title)
        for record in records
    }
    with_mask = [record for record in records if record.mask is not None]
    if with_mask:
        step = with_mask[0].time_steps // 2  # at the first step, starting from rest, few neurons fire
        figures[QUERY_KEY] = draw_query_key(with_mask, step=step, title=title)
    return figures
