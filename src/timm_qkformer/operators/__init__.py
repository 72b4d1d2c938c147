"""Token mixers, one file each. Importing this package registers them: a new file needs no line here."""

from importlib import import_module
from pkgutil import iter_modules

from .base import (
    CHANNELS,
    TOKENS,
    NativeKernel,
    Operation,
    Operator,
    Views,
    feedback_operators,
    get_operator,
    operator_names,
    register_operator,
    sum_channels,
    sum_tokens,
)

__all__ = [
    "CHANNELS",
    "TOKENS",
    "NativeKernel",
    "Operation",
    "Operator",
    "Views",
    "feedback_operators",
    "get_operator",
    "operator_names",
    "register_operator",
    "sum_channels",
    "sum_tokens",
]

for _found in iter_modules(__path__):
    if _found.name != "base":
        _module = import_module(f"{__name__}.{_found.name}")
        globals().update({_name: getattr(_module, _name) for _name in _module.__all__})
        __all__.extend(_module.__all__)
