"""Models. Importing this package registers them with timm."""

from .base import (
    Architecture,
    BlockSpec,
    EmbedSpec,
    MixerSpec,
    SpikingTransformer,
    StageSpec,
    StemSpec,
)
from .maxformer import MaxFormer
from .qkformer import QKFormer
from .spiliformer import SpiLiFormer

__all__ = [
    "Architecture",
    "BlockSpec",
    "EmbedSpec",
    "MaxFormer",
    "MixerSpec",
    "QKFormer",
    "SpiLiFormer",
    "SpikingTransformer",
    "StageSpec",
    "StemSpec",
]
