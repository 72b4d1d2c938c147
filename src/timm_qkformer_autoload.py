"""Registers the models as soon as timm is imported, so that no script needs to know of this package.

PyTorch calls the entry points of its group ``torch.backends`` at the end of ``import torch``, and timm imports torch
first. `autoload` is ours: it leaves a finder in ``sys.meta_path`` that waits for ``timm.models``, lets the regular
machinery import it, has ``timm_qkformer`` register the models, and is gone. This module imports neither torch nor timm;
where timm is never imported, nothing else is.

``TORCH_DEVICE_BACKEND_AUTOLOAD=0`` (PyTorch's switch) or ``TIMM_QKFORMER_AUTOLOAD=0`` turns it off; then
``import timm_qkformer`` registers the models.
"""

import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType

_TARGET = "timm.models"


def autoload() -> None:
    """Entry point of the group ``torch.backends``. Never raises: PyTorch would fail to import."""
    try:
        if os.environ.get("TIMM_QKFORMER_AUTOLOAD", "1") == "0":
            return
        if _TARGET in sys.modules or any(isinstance(finder, _TimmFinder) for finder in sys.meta_path):
            return
        sys.meta_path.insert(0, _TimmFinder())
    except Exception as error:
        _warn(error)


class _TimmFinder:
    """Finds ``timm.models`` once, through the other finders, and has its loader register our models afterwards."""

    def find_spec(
        self, name: str, path: "Sequence[str] | None" = None, target: "ModuleType | None" = None
    ) -> "ModuleSpec | None":
        if name != _TARGET:
            return None
        try:
            sys.meta_path.remove(self)
        except ValueError:  # another thread got here first
            return None
        for finder in list(sys.meta_path):
            find_spec = getattr(finder, "find_spec", None)
            spec = find_spec(name, path, target) if find_spec is not None else None
            if spec is not None:
                _register_after_exec(spec.loader)
                return spec
        return None


def _register_after_exec(loader: object) -> None:
    """Shadow this one loader's ``exec_module`` until it has executed ``timm.models``."""
    try:
        exec_module = loader.exec_module  # type: ignore[attr-defined]

        def exec_and_register(module: "ModuleType") -> None:
            if module.__name__ == _TARGET:
                del loader.exec_module  # type: ignore[attr-defined]
            exec_module(module)
            if module.__name__ == _TARGET:
                _register()

        loader.exec_module = exec_and_register  # type: ignore[attr-defined]
    except Exception as error:
        _warn(error)


def _register() -> None:
    if "timm_qkformer" in sys.modules:
        return  # timm is being imported by our own package, which registers the models itself
    try:
        import timm_qkformer.models  # noqa: F401
    except Exception as error:
        _warn(error)


def _warn(error: Exception) -> None:
    import warnings

    warnings.warn(
        f"timm-qkformer could not register its models with timm: {type(error).__name__}: {error}",
        RuntimeWarning,
        stacklevel=2,
    )
