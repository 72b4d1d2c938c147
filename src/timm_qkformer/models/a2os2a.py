"""A2OS2A: Accurate Addition-Only Spiking Self-Attention.

Paper: https://arxiv.org/abs/2503.00226 (CVPR 2025). The authors have published no code.

Addition-only self-attention on the backbone of the Spike-driven Transformer. What of it the paper says, and what is
inferred, is in `operators/a2os2a.py`; that the operator ends in a projection follows from the published parameter
counts.
"""

from collections.abc import Mapping
from typing import Any

from timm.models._registry import generate_default_cfgs
from torch import nn

from .checkpoints import StateDict, unwrap_checkpoint
from .flat import CIFAR_POOLS, flat_cfgs
from .sdt import SpikeDrivenTransformer
from .variants import Variant, register_variants


def checkpoint_filter_fn(state_dict: dict[str, Any], model: nn.Module) -> StateDict:
    """The tensors of a checkpoint of this package's; there is no release.

    Raises:
        ValueError: For the names of the Spike-driven Transformer's release, whose tensors are shaped as these are.
    """
    tensors = unwrap_checkpoint(state_dict)
    if any(name.startswith("patch_embed.") for name in tensors):
        raise ValueError("these are a release's names, and A2OS2A has none: create the model that they belong to")
    return tensors


_ATTN: Mapping[str, Any] = {"attn": "a2os2a"}
_CIFAR: Mapping[str, Any] = {**_ATTN, "pools": CIFAR_POOLS, "depth": 2}

_VARIANTS = {
    "a2os2a_8_512": Variant("A2OS2A-8-512 for ImageNet: 29.69 M parameters, T = 4.", _ATTN),
    "a2os2a_10_512": Variant("A2OS2A-10-512 for ImageNet: 36.01 M parameters, T = 4.", {**_ATTN, "depth": 10}),
    "a2os2a_2_512": Variant("A2OS2A-2-512 for CIFAR: 10.23 M parameters, T = 4.", _CIFAR),
    "a2os2a_2_256": Variant("A2OS2A-2-256 for CIFAR: 2.57 M parameters, T = 4.", {**_CIFAR, "embed_dim": 256}),
    "test_a2os2a": Variant("A tiny A2OS2A, for tests.", {**_CIFAR, "embed_dim": 32, "num_heads": 4}),
}

default_cfgs = generate_default_cfgs(
    flat_cfgs(
        {
            "paper_ids": "arXiv:2503.00226",
            "paper_name": "Spiking Transformer: Introducing Accurate Addition-Only Spiking Self-Attention for "
            "Transformer",
        },
        _VARIANTS,
    )
)

register_variants(__name__, SpikeDrivenTransformer, checkpoint_filter_fn, _VARIANTS)
