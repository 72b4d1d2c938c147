"""Memory for large tensors that are written at once and dropped soon."""

import ctypes
import os
import sys
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

_LEAST = 1 << 22  # bytes
_HUGE_PAGE = 14  # MADV_HUGEPAGE
_PAGE = 4096
_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # of mallopt


def keep_freed_memory() -> bool:
    """Let the C library of this process reuse freed memory instead of returning large blocks to the kernel.

    By default glibc maps and unmaps each large tensor anew, and filling the page tables takes longer than a cheap
    operation. What the process holds stays what it needed at most. Whoever tuned malloc in the environment is not
    overruled.

    Returns:
        Whether it does now.
    """
    tuned = any(name.startswith("MALLOC_") for name in os.environ) or "malloc" in os.environ.get("GLIBC_TUNABLES", "")
    if tuned or sys.platform != "linux":
        return False
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt"):
        return False
    return bool(libc.mallopt(_MMAP_MAX, 0) and libc.mallopt(_TRIM_THRESHOLD, 2**31 - 1))


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
