"""What the papers call a model's layers: QKFormer (arXiv 2403.16552), eq. 4 to 11 and its table of firing rates.

    Q, K, V           neurons of queries, keys and (SSA) values
    A_t, A_c          neurons of the token (QKTA) and channel (QKCA) attention vector
    X'                what the attention gives and its projection takes: the mask times K, which no neuron of its own
                      fires (QKTA, QKCA), or the neuron LIF(Q K^T V * scale) (SSA)
    X''               neuron after the projection
    SMLP layer 1, 2   neurons after the MLP's two layers

Membrane shortcuts have no neurons after the projection and the second MLP layer; theirs stand in front of the
sub-blocks ("attention input", "SMLP input"), the patch embeddings ("input") and the classifier ("head").
"""

import re
from dataclasses import dataclass
from typing import Any, Optional

from torch import nn

from ..layers import QKChannelAttention, QKTokenAttention, SpikingNeuron
from ..layers.attention import _SpikingAttention

__all__ = ["SpikeSource", "place_of", "spike_sources"]

_PLACE = re.compile(r"(?:^|\.)stages\.(\d+)\.(?:embed|blocks\.(\d+))(?:\.|$)")

_PLACES = {"stem": "stem", "readout": "head", "head": "head"}

# Ends of module paths and their names in the paper.
_NAMES: tuple[tuple[str, str], ...] = (
    (r"attn\.q\.neuron", "Q"),
    (r"attn\.k\.neuron", "K"),
    (r"attn\.v\.neuron", "V"),
    (r"attn\.proj\.neuron", "X''"),
    (r"attn\.dw\.neuron", "DWC"),
    (r"mlp\.fc1\.neuron", "SMLP layer 1"),
    (r"mlp\.fc2\.neuron", "SMLP layer 2"),
    (r"neuron1", "attention input"),
    (r"neuron2", "SMLP input"),
    (r"embed\.neuron", "input"),
    (r"embed\.main\.(\d+)\.neuron", "conv {}"),
    (r"embed\.shortcut\.neuron", "shortcut"),
    (r"stem\.neuron", "conv"),
    (r"readout\.neuron", "rate"),
)


@dataclass(frozen=True)
class SpikeSource:
    """Where a model has spikes.

    Attributes:
        path: Name of the module.
        name: Its name in the paper, see the module's first lines; the path where the paper has none.
        place: Part of the model: "stem", "stage 1, embedding", "stage 1, block 1", "head" or "" elsewhere.
        stage: Number of the stage, from 1 as in the paper.
        block: Number of the block in its stage, from 1.
        is_neuron: Whether the spikes are a neuron layer's output. X' of QKTA and QKCA is the input of the module.
        channel_dims: How many dimensions of the spikes [T, B, channels..., positions...] number channels.
    """

    path: str
    name: str
    place: str
    stage: Optional[int]
    block: Optional[int]
    is_neuron: bool = True
    channel_dims: int = 1


def spike_sources(model: nn.Module) -> list[SpikeSource]:
    """All neuron layers of a model, and X' of QKTA and QKCA."""
    modules: dict[str, Any] = dict(model.named_modules())
    sources = []
    for path, module in modules.items():
        if isinstance(module, SpikingNeuron):
            owner = modules.get(path.rpartition(".")[0])
            in_attention = isinstance(owner, _SpikingAttention) and owner.attn_neuron is module
            name = _attention_name(owner) if in_attention else _name(path)
            # Attention neurons see [T, B, heads, channels of a head, tokens].
            sources.append(SpikeSource(path, name, *place_of(path), channel_dims=2 if in_attention else 1))
        elif isinstance(module, QKTokenAttention):
            sources.append(SpikeSource(f"{path}.proj", "X'", *place_of(path), is_neuron=False))
    return sources


def _attention_name(attention: Any) -> str:
    if isinstance(attention, QKChannelAttention):
        return "A_c"
    return "A_t" if isinstance(attention, QKTokenAttention) else "X'"


def _name(path: str) -> str:
    for pattern, name in _NAMES:
        match = re.search(rf"(?:^|\.){pattern}$", path)
        if match:
            return name.format(*(int(number) + 1 for number in match.groups()))
    return path


def place_of(path: str) -> tuple[str, Optional[int], Optional[int]]:
    """Part of the model that a module belongs to, stage and block: see `SpikeSource`."""
    match = _PLACE.search(path)
    if match is None:
        names = path.split(".")
        return next((place for name, place in _PLACES.items() if name in names), ""), None, None
    stage = int(match[1]) + 1
    if match[2] is None:
        return f"stage {stage}, embedding", stage, None
    block = int(match[2]) + 1
    return f"stage {stage}, block {block}", stage, block
