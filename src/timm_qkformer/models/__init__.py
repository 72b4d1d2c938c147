"""Models. Importing this package registers them with timm."""

from ..layers import PositionSpec, UnitSpec
from . import a2os2a  # noqa: F401, registers its models
from .aliases import register_aliases
from .architecture import Architecture, BlockSpec, ChainSpec, EmbedSpec, MixerSpec, StageSpec
from .autost import AutoST
from .base import SpikingTransformer
from .maxformer import MaxFormer
from .qkformer import QKFormer
from .sdt import SpikeDrivenTransformer
from .semm import SEMM
from .spikformer import Spikformer
from .spikingformer import Spikingformer
from .spiliformer import SpiLiFormer
from .stepping import StreamState
from .tim import TIM

__all__ = [
    "SEMM",
    "TIM",
    "Architecture",
    "AutoST",
    "BlockSpec",
    "ChainSpec",
    "EmbedSpec",
    "MaxFormer",
    "MixerSpec",
    "PositionSpec",
    "QKFormer",
    "SpiLiFormer",
    "SpikeDrivenTransformer",
    "Spikformer",
    "SpikingTransformer",
    "Spikingformer",
    "StageSpec",
    "StreamState",
    "UnitSpec",
]

register_aliases()
