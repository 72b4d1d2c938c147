"""Memory for large tensors that are written at once and dropped soon."""

import ctypes
import sys
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

_LEAST = 1 << 22  # bytes
_HUGE_PAGE = 14  # MADV_HUGEPAGE
_PAGE = 4096


def fresh(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """An uninitialized tensor on the CPU, in huge pages where Linux gives them on request.

    The kernel hands out large tensors page by page while they are first written, which takes longer than the writing;
    numpy asks for huge pages from the same size on.
    """
    tensor = torch.empty(*shape, dtype=dtype, device="cpu")
    size = tensor.numel() * tensor.element_size()
    if size >= _LEAST and (advise := _advise()) is not None:
        start = -(-tensor.data_ptr() // _PAGE) * _PAGE
        advise(start, tensor.data_ptr() + size - start, _HUGE_PAGE)
    return tensor


@cache
def _advise() -> Any:
    if sys.platform != "linux":
        return None
    advise = getattr(ctypes.CDLL(None), "madvise", None)
    if advise is not None:
        advise.argtypes, advise.restype = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int], ctypes.c_int
    return advise
