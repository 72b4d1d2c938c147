"""The kernels of `kernels.cpp`, for all types of input currents and spikes that deployed models have."""

from collections.abc import Callable
from ctypes import c_double
from typing import Any

import torch
from torch import Tensor

from ..layers.native import INT, POINTER, THREADS, function, may_run

__all__ = ["kernel"]

# (currents, spikes), as kernels.cpp spells them
_TYPES: dict[tuple[torch.dtype, torch.dtype], str] = {
    (torch.float64, torch.float64): "float64_float64, double, double",
    (torch.float32, torch.float32): "float32_float32, float, float",
    (torch.float32, torch.bfloat16): "float32_bfloat16, float, BFloat16",
    (torch.float32, torch.uint8): "float32_uint8, float, std::uint8_t",
    (torch.bfloat16, torch.bfloat16): "bfloat16_bfloat16, BFloat16, BFloat16",
}

_OPERANDS: dict[str, list[Any]] = {
    "fire": [POINTER, INT, POINTER, INT, POINTER, INT, INT, INT, POINTER, THREADS],
    "pool_fire": [POINTER, INT, POINTER, *[INT] * 5, POINTER, THREADS],
    "token_attention": [POINTER, POINTER, *[INT] * 5, POINTER, THREADS],
    "channel_attention": [POINTER, POINTER, *[INT] * 5, POINTER, THREADS],
    "self_attention": [POINTER, POINTER, *[INT] * 5, c_double, POINTER, THREADS],
}

# The functions of each pair's library.
_FUNCTIONS = {
    types: {f"{name}_{types.split(',')[0]}": operands for name, operands in _OPERANDS.items()}
    for types in _TYPES.values()
}


def kernel(name: str, x: Tensor, out: Tensor) -> Callable[..., None] | None:
    """The kernel for these currents and results; None where torch operations have to do.

    That is: on other devices, where `set_lif_backend` asks for another backend, for nothing to compute, and, after one
    warning, on machines that cannot compile it. The caller passes torch's number of threads last.
    """
    types = _TYPES.get((x.dtype, out.dtype))
    if types is None or not may_run(x):
        return None
    name = f"{name}_{types.split(',')[0]}"
    return function(name, __package__, "kernels.cpp", _FUNCTIONS[types], f"KERNELS({types})\n")
