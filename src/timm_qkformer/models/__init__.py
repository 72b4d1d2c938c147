"""Models. Importing this package registers them with timm."""

from .maxformer import MaxFormer
from .qkformer import QKFormer

__all__ = ["MaxFormer", "QKFormer"]
