"""Models. Importing this package registers them with timm."""

from .qkformer import QKFormer

__all__ = ["QKFormer"]
