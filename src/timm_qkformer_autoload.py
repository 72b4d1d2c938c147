"""Registers the models as soon as timm is imported, so that no script needs to know of this package.

PyTorch calls the entry points of its group ``torch.backends`` at the end of ``import torch``, and timm imports torch
first. `autoload` is ours: it leaves a finder in ``sys.meta_path`` that waits for ``timm.models``, lets the regular
machinery import it, and has ``timm_qkformer`` register the models. It stays there, so that a timm that was dropped from
``sys.modules`` and is imported again has the models, too. This module imports neither torch nor timm; where timm is
never imported, nothing else is.

Threads: ``timm_qkformer`` imports timm before anything else, so whichever of the two is imported first, and in however
many threads, timm's lock is taken first and one thread registers the models within it.

``TORCH_DEVICE_BACKEND_AUTOLOAD=0`` (PyTorch's switch) or ``TIMM_QKFORMER_AUTOLOAD=0`` (or off, false, no) turns it off;
then ``import timm_qkformer`` registers the models.
"""

import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType

_TARGET = "timm.models"
_PACKAGE = "timm_qkformer"
_SWITCH = "TIMM_QKFORMER_AUTOLOAD"
_SETTINGS = dict.fromkeys(("", "1", "on", "true", "yes"), True) | dict.fromkeys(("0", "off", "false", "no"), False)


def autoload() -> None:
    """Entry point of the group ``torch.backends``. Never raises: PyTorch would fail to import."""
    try:
        setting = os.environ.get(_SWITCH, "").strip()
        is_on = _SETTINGS.get(setting.lower())
        if is_on is None:
            _warn(f"the environment variable {_SWITCH}={setting!r} is neither on (1, true, yes) nor off (0, false, no)")
        if is_on is False or _TARGET in sys.modules:
            return
        if any(type(finder).__name__ == _TimmFinder.__name__ for finder in sys.meta_path):
            return
        sys.meta_path.insert(0, _TimmFinder())
    except Exception as error:
        _warn(f"timm-qkformer cannot register its models with timm: {type(error).__name__}: {error}")


class _TimmFinder:
    """Finds ``timm.models`` through the other finders, and has its loader register our models afterwards."""

    def find_spec(
        self, name: str, path: "Sequence[str] | None" = None, target: "ModuleType | None" = None
    ) -> "ModuleSpec | None":
        if name != _TARGET:
            return None
        for finder in list(sys.meta_path):
            find_spec = None if finder is self else getattr(finder, "find_spec", None)
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
                _register(module)

        loader.exec_module = exec_and_register  # type: ignore[attr-defined]
    except Exception as error:
        _warn(f"timm-qkformer cannot register its models with timm: {type(error).__name__}: {error}")


def _register(models: "ModuleType") -> None:
    """Import our models, anew if they belong to a timm that was dropped: they stand on its layers and its registry."""
    try:
        if f"{_PACKAGE}.models" in sys.modules and not models.is_model("test_qkformer"):
            for name in [name for name in sys.modules if name == _PACKAGE or name.startswith(f"{_PACKAGE}.")]:
                del sys.modules[name]
        import timm_qkformer.models  # noqa: F401
    except Exception as error:
        _warn(
            f"timm-qkformer could not register its models with timm: {type(error).__name__}: {error}{_versions(error)}"
        )


def _versions(error: Exception) -> str:
    """Which timm that is, if something was not found in it: scripts run inside a checkout take that one."""
    if not isinstance(error, (ImportError, AttributeError)):
        return ""
    try:
        from importlib.metadata import requires

        timm = sys.modules["timm"]
        needed = next((line for line in requires("timm-qkformer") or () if line.startswith("timm")), "a newer timm")
        folder = os.path.dirname(timm.__file__ or "")
        return f". This timm is {getattr(timm, '__version__', 'of no version')} in {folder}; needed is {needed}"
    except Exception:
        return ""


def _warn(message: str) -> None:
    """A warning; where warnings are errors, a line on stderr, since nothing may be raised here."""
    import warnings

    try:
        warnings.warn(message, RuntimeWarning, stacklevel=2)
    except Warning:
        print(message, file=sys.stderr)
