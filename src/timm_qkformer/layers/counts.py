"""Spike counts: tensors known to hold small non-negative integers, and their storage in a few bits an element.

Spikes are 0 or 1 and sums of spikes are small integers, so what a layer must remember of its input for the backward
pass fits into 1, 2, 4 or 8 bits an element, losslessly. Which tensors hold such numbers is not found out by looking,
which would cost a pass over them and, on a GPU, a stop: whoever makes spikes or adds them up says so (`note_counts`,
`add_counts`). A note belongs to one tensor object and is void once the tensor is modified in place; results of any
other operation have none, and layers then keep them as they are.
"""

from typing import Optional

import torch
from timm.layers import register_notrace_function
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

__all__ = ["add_counts", "counts_bound", "move_note", "note_counts", "pack", "packed", "unpack"]

_MAX_BOUND = 255


class _Note:
    """That a tensor holds integers from 0 to `bound`, and their packed form once somebody asked for it."""

    def __init__(self, bound: int, version: int) -> None:
        self.bound = bound
        self.version = version
        self.packed: Tensor | None = None


_notes = WeakTensorKeyDictionary()  # not an attribute of the tensor: that would be saved and copied with it


def note_counts(x: Tensor, bound: int) -> Tensor:
    """Note that `x` holds integers from 0 to `bound` alone; returns `x`. Has no effect on what is being traced."""
    if not _is_traced() and type(x) is Tensor and bound <= _MAX_BOUND and not x.is_inference():
        _notes[x] = _Note(bound, x._version)
    return x


def counts_bound(x: Tensor) -> Optional[int]:
    """The largest value that `x` may hold, None where nothing is known of it."""
    note = _note(x)
    return note.bound if note else None


def move_note(source: Tensor, result: Tensor) -> Tensor:
    """Note for `result`, which holds some or all of the numbers in `source`, what is known of `source`."""
    bound = counts_bound(source)
    return result if bound is None else note_counts(result, bound)


@register_notrace_function
def add_counts(x: Tensor, y: Tensor) -> Tensor:
    """x + y, noted as counts if both are."""
    total = x + y
    if not torch.jit.is_scripting():
        _note_sum(total, x, y)
    return total


def _note_sum(total: Tensor, x: Tensor, y: Tensor) -> None:
    bounds = counts_bound(x), counts_bound(y)
    if bounds[0] is not None and bounds[1] is not None:
        note_counts(total, bounds[0] + bounds[1])


def _is_traced() -> bool:
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


def _note(x: Tensor) -> Optional[_Note]:
    if _is_traced() or type(x) is not Tensor:
        return None
    note: Optional[_Note] = _notes.get(x)
    return note if note is not None and note.version == x._version else None


def packed(x: Tensor) -> Tensor:
    """Packed form of a noted tensor of images in channels-last memory; for all layers that `x` goes to the same one."""
    note = _note(x)
    assert note is not None
    if note.packed is None:
        note.packed = pack(x.detach(), note.bound)
    return note.packed


def _bits(bound: int) -> int:
    return next(bits for bits in (1, 2, 4, 8) if bound < 2**bits)


def _last_dim_channels(x: Tensor) -> Tensor:
    """[..., C, H, W] as [..., H, W, C]: contiguous for channels-last memory."""
    return x.movedim(-3, -1)


def pack(x: Tensor, bound: int) -> Tensor:
    """Integers from 0 to `bound` (at most 255) as bytes, 8, 4, 2 or 1 of them in each.

    Args:
        x: [..., C, H, W], read in the order of channels-last memory. Byte j holds elements j, j + m, j + 2 m, ...,
            lowest bits first, with m the number of bytes: so all passes over memory are straight.
        bound: Largest value there is.
    """
    bits = _bits(bound)
    flat = _last_dim_channels(x).reshape(-1)
    if bits == 8:
        return flat.to(torch.uint8)
    size = -(-len(flat) * bits // 8)
    total = flat[:size].clone()  # in floating point: half precision, too, is exact up to 255
    for place in range(1, 8 // bits):
        chunk = flat[place * size : (place + 1) * size]
        total[: len(chunk)].add_(chunk, alpha=2 ** (bits * place))
    return total.to(torch.uint8)


def unpack(data: Tensor, bound: int, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """What `pack` was given, as [..., C, H, W] of `shape` in channels-last memory."""
    bits = _bits(bound)
    *outer, C, H, W = shape
    if bits == 8:
        flat = data.to(dtype)
    else:
        flat = torch.empty(shape.numel(), dtype=dtype, device=data.device)
        size, mask = len(data), 2**bits - 1
        for place in range(8 // bits):
            chunk = flat[place * size : (place + 1) * size]
            chunk.copy_((data[: len(chunk)] >> (bits * place)).bitwise_and_(mask))
    return flat.view(*outer, H, W, C).movedim(-1, -3)
