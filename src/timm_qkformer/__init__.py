"""Hierarchical spiking transformers (QKFormer, arXiv 2403.16552) as timm models.

Importing this package registers the models with timm. With the package installed that happens by itself when
timm is imported, see `timm_qkformer_autoload`.
"""

from . import layers, models
from .models import MaxFormer, QKFormer

__version__ = "0.1.0"

__all__ = ["MaxFormer", "QKFormer", "__version__", "layers", "models"]
