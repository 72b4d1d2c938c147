"""The kernels of `kernels.cpp`, compiled on this machine for the types that are asked for, when they are first needed.

torch's own compiler driver does the work: it finds the C++ compiler, chooses the flags that Inductor's kernels are
built with (this processor's instructions, torch's OpenMP runtime, no contraction of products and sums), and keeps the
result in its cache on disk.
"""

import ctypes
import warnings
from collections.abc import Callable
from importlib.resources import files
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from ..layers import current_lif_backend
from .neurons import NeuronSpec

__all__ = ["kernel", "neuron_operand"]

# (currents, spikes), as kernels.cpp spells them
_TYPES: dict[tuple[torch.dtype, torch.dtype], str] = {
    (torch.float64, torch.float64): "float64_float64, double, double",
    (torch.float32, torch.float32): "float32_float32, float, float",
    (torch.float32, torch.bfloat16): "float32_bfloat16, float, BFloat16",
    (torch.float32, torch.uint8): "float32_uint8, float, std::uint8_t",
    (torch.bfloat16, torch.bfloat16): "bfloat16_bfloat16, BFloat16, BFloat16",
}

_POINTER, _INT, _THREADS = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
_ARGUMENTS: dict[str, list[Any]] = {
    "fire": [_POINTER, _INT, _POINTER, _INT, _POINTER, _INT, _INT, _INT, _POINTER, _THREADS],
    "pool_fire": [_POINTER, _INT, _POINTER, *[_INT] * 5, _POINTER, _THREADS],
    "token_attention": [_POINTER, _POINTER, *[_INT] * 5, _POINTER, _THREADS],
    "channel_attention": [_POINTER, _POINTER, *[_INT] * 5, _POINTER, _THREADS],
    "self_attention": [_POINTER, _POINTER, *[_INT] * 5, ctypes.c_double, _POINTER, _THREADS],
}

_libraries: dict[str, ctypes.CDLL | None] = {}
_compiling = Lock()


class _Neuron(ctypes.Structure):
    _fields_ = [
        ("leak", ctypes.c_double),
        ("threshold", ctypes.c_double),
        ("soft_reset", ctypes.c_int32),
        ("decay_input", ctypes.c_int32),
    ]


def neuron_operand(*neurons: NeuronSpec) -> ctypes.Array:
    """Neurons as the kernels take them."""
    return (_Neuron * len(neurons))(*(_Neuron(*neuron) for neuron in neurons))


def kernel(name: str, x: Tensor, out: Tensor) -> Callable[..., None] | None:
    """The kernel for these currents and results; None where torch operations have to do.

    That is: on other devices, where `set_lif_backend` asks for another backend, for nothing to compute, and, after one
    warning, on machines that cannot compile it. The caller passes torch's number of threads last.
    """
    types = _TYPES.get((x.dtype, out.dtype))
    if types is None or not x.is_cpu or x.numel() == 0 or current_lif_backend() not in ("auto", "compile"):
        return None
    if types not in _libraries:
        with _compiling:
            if types not in _libraries:
                _libraries[types] = _compile(types)
    library = _libraries[types]
    return None if library is None else getattr(library, f"{name}_{types.split(',')[0]}")


def _compile(types: str) -> ctypes.CDLL | None:
    try:
        from torch._inductor.codecache import CppCodeCache  # not at import: it takes seconds

        source = files(__package__).joinpath("kernels.cpp").read_text()
        library = CppCodeCache.load(f"{source}\nKERNELS({types})\n")
        _declare(library, types.split(",")[0])
    except Exception as error:
        warnings.warn(
            "deployed models run their neurons as single torch operations on this machine because the fused kernels do "
            f"not compile, which costs speed but changes no result: {type(error).__name__}: {error}",
            RuntimeWarning,
            stacklevel=2,
        )
        return None
    return library


def _declare(library: ctypes.CDLL, suffix: str) -> None:
    for name, arguments in _ARGUMENTS.items():
        function = getattr(library, f"{name}_{suffix}")
        function.argtypes, function.restype = arguments, None
