"""Hierarchical spiking transformers (QKFormer, arXiv 2403.16552) as timm models.

Importing this package registers the models with timm. With the package installed that happens by itself when
timm is imported, see `timm_qkformer_autoload`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

import timm  # noqa: F401, before any module of ours: see timm_qkformer_autoload

from . import execution, layers, models, neurons, operators
from .models import MaxFormer, QKFormer

if TYPE_CHECKING:
    from . import analysis, streaming
    from .exporting import export
    from .inference import deploy, quantize_weights
    from .streaming import anytime

__version__ = "0.2.0"

__all__ = [
    "MaxFormer",
    "QKFormer",
    "__version__",
    "analysis",
    "anytime",
    "deploy",
    "execution",
    "export",
    "layers",
    "models",
    "neurons",
    "operators",
    "quantize_weights",
    "streaming",
]


def __getattr__(name: str) -> Any:
    # When it is first used: importing timm imports this package.
    if name in ("analysis", "streaming"):
        return import_module(f".{name}", __name__)
    if name == "export":
        from . import exporting

        return exporting.export
    if name == "anytime":
        return import_module(".streaming", __name__).anytime
    if name in ("deploy", "quantize_weights"):
        from . import inference

        return getattr(inference, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
