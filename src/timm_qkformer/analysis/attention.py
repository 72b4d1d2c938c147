"""What the attention layers do with a batch: queries, keys, masks, and what is left after masking.

The names are those of QKFormer (arXiv 2403.16552), eq. 7 to 10 and Fig. 3. The arrays are plain numpy arrays, to be
drawn by `pictures` or processed by anything else.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Optional

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from ..layers import QKChannelAttention, QKTokenAttention, SpikingSelfAttention
from .capture import capture_outputs
from .running import bare_model

__all__ = ["AttentionRecord", "attention_layers", "record_attention"]

Spikes = NDArray[np.bool_]

# A QKCA layer is a QKTA layer by inheritance: the first match counts.
_KINDS: tuple[tuple[type[nn.Module], str], ...] = (
    (QKChannelAttention, "qkca"),
    (QKTokenAttention, "qkta"),
    (SpikingSelfAttention, "ssa"),
)


@dataclass(frozen=True)
class AttentionRecord:
    """One attention layer's spikes for one batch.

    Attributes:
        name: Module name of the layer, such as "stages.0.blocks.0.attn".
        kind: "qkta", "qkca" or "ssa".
        q: Q, bool [T, B, heads, channels of a head, H, W].
        k: K, likewise.
        v: V of SSA, likewise; else None.
        mask: What Q decides: A_t of QKTA, bool [T, B, heads, 1, H, W]; A_c of QKCA, bool [T, B, heads, channels of a
            head, 1, 1]. SSA has none.
        attended: X', shaped as K: mask * K, of SSA LIF(scale * Q K^T V).
        scale: Of SSA's Q K^T V; 1 for the others, which have none.
    """

    name: str
    kind: str
    q: Spikes
    k: Spikes
    v: Optional[Spikes]
    mask: Optional[Spikes]
    attended: Spikes
    scale: float = 1.0

    @property
    def heads(self) -> int:
        return self.k.shape[2]

    @property
    def time_steps(self) -> int:
        return self.k.shape[0]

    def token_values(self) -> NDArray[np.float32]:
        """How much each token counts, by time step and head: float32 [T, B, heads, H, W].

        - QKTA: the mask A_t, 0 or 1.
        - SSA: the attention that a token receives, that is the weight scale * (q_i . k_j) of token j, averaged over
          all queries i; from 0 to scale * channels of a head.
        - QKCA keeps or drops channels for all tokens at once: the share of the head's channels that spike in X'.
        """
        if self.kind == "qkta":
            assert self.mask is not None
            return self.mask[:, :, :, 0].astype(np.float32)
        if self.kind == "ssa":
            mean_query = self.q.mean((4, 5), keepdims=True, dtype=np.float32)
            return self.scale * (mean_query * self.k).sum(3, dtype=np.float32)
        return self.attended.mean(3, dtype=np.float32)

    def channel_values(self) -> NDArray[np.float32]:
        """How much each channel counts, by time step and head: float32 [T, B, heads, channels of a head].

        QKCA: the mask A_c, 0 or 1. QKTA and SSA: the share of tokens at which the channel spikes in X'.
        """
        if self.kind == "qkca":
            assert self.mask is not None
            return self.mask[..., 0, 0].astype(np.float32)
        return self.attended.mean((4, 5), dtype=np.float32)


def attention_layers(model: nn.Module) -> dict[str, str]:
    """The kinds ("qkta", "qkca", "ssa") of a model's attention layers, by module name, in the model's order."""
    layers = {}
    for name, module in bare_model(model).named_modules():
        for cls, kind in _KINDS:
            if isinstance(module, cls):
                layers[name] = kind
                break
    return layers


def record_attention(model: nn.Module, x: Tensor, layers: Optional[Sequence[str]] = None) -> list[AttentionRecord]:
    """Run a batch and record what its attention layers do.

    The model runs in eval mode and is left as it was, also by an error. A compiled or DDP-wrapped model is looked at
    below the wrapper.

    Args:
        model: Any model with attention layers of this package.
        x: Images [B, C, H, W] or event clips [B, T, C, H, W].
        layers: Names from `attention_layers`; None for all.

    Raises:
        ValueError: If the model has no attention, no layer of such a name, or the input cannot be run.
    """
    plain = bare_model(model)
    kinds = attention_layers(plain)
    if not kinds:
        raise ValueError(f"{type(plain).__name__} has no Q-K or spiking self-attention to look into")
    unknown = [name for name in layers or () if name not in kinds]
    if unknown:
        raise ValueError(f"{unknown[0]!r} is no attention layer; there are {', '.join(kinds)}")
    names = list(kinds if layers is None else layers)
    parts = [f"{name}.{part}" for name in names for part in _parts(kinds[name])]
    outputs = capture_outputs(plain, x, parts)
    return [_record(plain.get_submodule(name), name, kinds[name], outputs) for name in names]


def _parts(kind: str) -> tuple[str, ...]:
    return ("q", "k", "v", "attn_neuron") if kind == "ssa" else ("q", "k", "attn_neuron")


def _record(layer: Any, name: str, kind: str, outputs: dict[str, Tensor]) -> AttentionRecord:
    _, _, _, H, W = outputs[f"{name}.k"].shape

    def heads(part: str) -> Spikes:
        """[T, B, C, H, W] to [T, B, heads, C / heads, H, W]."""
        spikes = _as_bool(outputs[f"{name}.{part}"])
        return spikes.reshape(*spikes.shape[:2], layer.num_heads, layer.head_dim, H, W)

    q, k = heads("q"), heads("k")
    fired = _as_bool(outputs[f"{name}.attn_neuron"])  # [T, B, heads, channels or 1, tokens or 1]
    if kind == "ssa":
        attended = fired.reshape(k.shape)
        return AttentionRecord(name, kind, q, k, heads("v"), None, attended, float(layer.scale))
    mask = fired.reshape(*fired.shape[:4], H, W) if kind == "qkta" else fired[..., None]
    return AttentionRecord(name, kind, q, k, None, mask, mask & k)


def _as_bool(spikes: Tensor) -> Spikes:
    result: Spikes = spikes.bool().cpu().numpy()
    return result
