"""The kernels of `kernels.cpp` and `events.cpp`, compiled on this machine when they are first needed.

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

__all__ = ["event_kernel", "kernel", "neuron_operand"]

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

# The functions of each library of kernels.cpp, by their names there.
_FUNCTIONS = {
    types: {f"{name}_{types.split(',')[0]}": arguments for name, arguments in _ARGUMENTS.items()}
    for types in _TYPES.values()
}

# Input, weights, bias, scale; M, H, W, C, C', side, stride, width of a tile
_CONVOLUTION: list[Any] = [*[_POINTER] * 4, *[_INT] * 8]
_EVENT_ARGUMENTS: dict[str, list[Any]] = {
    f"{name}_{weights}": arguments
    for weights in ("float32", "int16")
    for name, arguments in (
        ("convolve", [*_CONVOLUTION, _POINTER, _THREADS]),
        ("convolve_fire", [*_CONVOLUTION, _INT, _POINTER, _POINTER, _INT, _POINTER, _INT, _THREADS]),
    )
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
    if types is None or not _wanted(x):
        return None
    library = _library(types, "kernels.cpp", f"KERNELS({types})\n", _FUNCTIONS[types])
    return None if library is None else getattr(library, f"{name}_{types.split(',')[0]}")


def event_kernel(name: str, weights: torch.dtype, x: Tensor) -> Callable[..., None] | None:
    """A kernel of events.cpp for spikes x and weights in float32 or int16; None as for `kernel`."""
    if not _wanted(x):
        return None
    library = _library("events", "events.cpp", "", _EVENT_ARGUMENTS)
    return None if library is None else getattr(library, f"{name}_{str(weights).removeprefix('torch.')}")


def _wanted(x: Tensor) -> bool:
    return x.is_cpu and x.numel() > 0 and current_lif_backend() in ("auto", "compile")


def _library(key: str, file: str, instances: str, functions: dict[str, list[Any]]) -> ctypes.CDLL | None:
    if key not in _libraries:
        with _compiling:
            if key not in _libraries:
                _libraries[key] = _compile(file, instances, functions)
    return _libraries[key]


def _compile(file: str, instances: str, functions: dict[str, list[Any]]) -> ctypes.CDLL | None:
    try:
        from torch._inductor.codecache import CppCodeCache  # not at import: it takes seconds

        source = "\n".join(files(__package__).joinpath(name).read_text() for name in ("neurons.cpp", file))
        library: ctypes.CDLL = CppCodeCache.load(f"{source}\n{instances}")
        for name, arguments in functions.items():
            function = getattr(library, name)
            function.argtypes, function.restype = arguments, None
    except Exception as error:
        warnings.warn(
            f"deployed models run without the kernels of {file} on this machine because they do not compile, which "
            f"costs speed but changes no result: {type(error).__name__}: {error}",
            RuntimeWarning,
            stacklevel=2,
        )
        return None
    return library
