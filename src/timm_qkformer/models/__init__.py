"""Models. Importing this package registers them with timm."""

from ..layers import PositionSpec, UnitSpec
from .architecture import Architecture, BlockSpec, ChainSpec, EmbedSpec, MixerSpec, StageSpec
from .base import SpikingTransformer
from .maxformer import MaxFormer
from .qkformer import QKFormer
from .sdt import SpikeDrivenTransformer
from .spikformer import Spikformer
from .spikingformer import Spikingformer

__all__ = [
    "Architecture",
    "BlockSpec",
    "ChainSpec",
    "EmbedSpec",
    "MaxFormer",
    "MixerSpec",
    "PositionSpec",
    "QKFormer",
    "SpikeDrivenTransformer",
    "Spikformer",
    "SpikingTransformer",
    "Spikingformer",
    "StageSpec",
    "UnitSpec",
]
