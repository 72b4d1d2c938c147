"""Hierarchical spiking transformers (QKFormer, arXiv 2403.16552) as timm models.

Importing this package registers the models with timm. With the package installed that happens by itself when
timm is imported, see `timm_qkformer_autoload`.
"""

from typing import TYPE_CHECKING, Any

from . import layers, models
from .models import MaxFormer, QKFormer

if TYPE_CHECKING:
    from .inference import deploy, round_weights

__version__ = "0.1.0"

__all__ = ["MaxFormer", "QKFormer", "__version__", "deploy", "layers", "models", "round_weights"]


def __getattr__(name: str) -> Any:
    # When it is first used: importing timm imports this package.
    if name in ("deploy", "round_weights"):
        from . import inference

        return getattr(inference, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
