"""Packed activations: tensors of few whole numbers, kept for the backward pass in 1, 2, 4 or 8 bits an element.

Spikes and their sums are small whole numbers, so what a layer must remember of its input fits into a few bits, without
loss. Which numbers an input may hold follows from how the network is put together (`Range`), and layers are told when
they are built. Nobody trusts that blindly: a hook or a replaced module may put out something else, so packing compares
what it packs with the range, and an input that does not fit it is kept as it is.
"""

import warnings
from collections.abc import Callable, Sequence
from ctypes import byref, c_int64
from functools import cached_property
from math import gcd, inf
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from .native import INT, POINTER, THREADS, function, may_run, training_kernels_pay

_MOST_VALUES = 256


class Range(NamedTuple):
    """Whole numbers that a tensor may hold, or, if its ends are infinite, any numbers.

    Attributes:
        low, high: The smallest and the largest.
        in_training: Whether that holds in training, too. Dropout and stochastic depth scale what they keep.
    """

    low: float
    high: float
    in_training: bool = True

    @property
    def is_real(self) -> bool:
        """Whether it is any numbers."""
        return self.high == inf

    @property
    def bits(self) -> int | None:
        """Bits in which an element is kept in training; None if it cannot be packed."""
        if self.is_real or not self.in_training or self.high - self.low >= _MOST_VALUES:
            return None
        return next(bits for bits in (1, 2, 4, 8) if self.high - self.low < 2**bits)

    def plus(self, other: "Range") -> "Range":
        """Range of the sum."""
        return Range(self.low + other.low, self.high + other.high, self.in_training and other.in_training)

    def times(self, other: "Range") -> "Range":
        """Range of the product."""
        if self.is_real or other.is_real:
            return REAL
        ends = [a * b for a in self[:2] for b in other[:2]]
        return Range(min(ends), max(ends), self.in_training and other.in_training)

    def dropped(self, drops: bool = True) -> "Range":
        """Range after dropout or stochastic depth, if there is any (`drops`)."""
        return self._replace(in_training=self.in_training and not drops)

    def __str__(self) -> str:
        return "real numbers" if self.is_real else f"whole numbers from {self.low:g} to {self.high:g}"


BINARY = Range(0, 1)
TERNARY = Range(-1, 1)
REAL = Range(-inf, inf)


def counts(most: int) -> Range:
    """Spike counts: whole numbers from 0 to `most`."""
    return Range(0, most)


class PackedTensor(NamedTuple):
    """A tensor in a few bits an element.

    Attributes:
        data: Bytes.
        numbers: What it may hold.
        shape: Of the tensor.
        spikes: Sum of the absolute values, if packing counted it.
    """

    data: Tensor
    numbers: Range
    shape: torch.Size
    spikes: int | None = None

    def without_data(self) -> "PackedTensor":
        """The rest of it."""
        return self._replace(data=self.data.new_empty(0))


def pack(x: Tensor, numbers: Range) -> PackedTensor | None:
    """Pack a tensor; None, after one warning, if it holds something else than these numbers.

    Args:
        x: [..., C, H, W], read in the order of channels-last memory. Byte j holds elements j, j + m, j + 2 m, ...,
            lowest bits first, with m the number of bytes: so all passes over memory are straight.
        numbers: Of which `bits` is not None.
    """
    flat = x.detach().movedim(-3, -1).reshape(-1)
    run = _kernel("pack", flat)
    packed = _pack_in_torch(flat, numbers) if run is None else _pack_natively(run, flat, numbers)
    if packed is None:
        _warn(numbers)
        return None
    return PackedTensor(packed[0], numbers, x.shape, packed[1])


def unpack(packed: PackedTensor, dtype: torch.dtype) -> Tensor:
    """What `pack` was given, as [..., C, H, W] in channels-last memory."""
    *outer, C, H, W = packed.shape
    flat = torch.empty(packed.shape.numel(), dtype=dtype, device=packed.data.device)
    run = _kernel("unpack", flat)
    if run is None:
        _unpack_in_torch(packed.data, packed.numbers, flat)
    else:
        layout = (*_layout(packed.data, packed.numbers), int(packed.numbers.low))
        run(packed.data.data_ptr(), *layout, flat.data_ptr(), len(flat), torch.get_num_threads())
    return flat.view(*outer, H, W, C).movedim(-1, -3)


def parts_of_a_step(steps: int, numbers: Range) -> int:
    """In how many parts of one size each of some time steps is cut, so that all of them together fill bytes."""
    elements = 8 // _bits(numbers)
    return elements // gcd(elements, steps)


def pack_chunks(chunks: Sequence[Tensor], numbers: Range) -> Tensor:
    """`pack`'s bytes [N, ...] of a flat tensor in chunks [...] of one size, as many as fill N times a byte.

    For kernels that have an element of each chunk at hand. Chunks are taken to hold what they may.
    """
    bits = _bits(numbers)
    count = len(chunks) * bits // 8
    shifted = [chunk.to(torch.int32) - int(numbers.low) for chunk in chunks]
    rows = []
    for first in range(count):
        total = shifted[first]
        for index, chunk in enumerate(shifted[first + count :: count], start=1):
            total = total + (chunk << (bits * index))
        rows.append(total.to(torch.uint8))
    return torch.stack(rows)


# By the tensor, with its version. Not an attribute of it, which torch.save would write into a user's file.
_known: Any = WeakTensorKeyDictionary()


def remember(x: Tensor, data: Tensor, numbers: Range) -> None:
    """Leave with x [T, B, C, H, W] what a kernel packed of it, for the layers that will ask."""
    packed = PackedTensor(data, numbers, torch.Size((x.shape[0] * x.shape[1], *x.shape[2:])))
    _known[x] = x._version, packed


def _remembered(x: Tensor, numbers: Range) -> PackedTensor | None:
    """What was left with x; None if that is nothing, or of other numbers, or x was changed since."""
    version, packed = _known.get(x, (None, None))
    return packed if packed is not None and packed.numbers == numbers and version == x._version else None


class SharedInput:
    """An input [T, B, C, H, W] of several layers, packed once for all of them when the first asks.

    Args:
        x: The input.
        numbers: What it may hold.
    """

    def __init__(self, x: Tensor, numbers: Range) -> None:
        self.x = x
        self.numbers = numbers

    @cached_property
    def images(self) -> Tensor:
        """[T * B, C, H, W] in channels-last memory."""
        return self.x.flatten(0, 1).contiguous(memory_format=torch.channels_last)

    @cached_property
    def packed(self) -> PackedTensor | None:
        """The images [T * B, C, H, W], packed; None if they cannot be."""
        if self.numbers.bits is None:
            return None
        return _remembered(self.x, self.numbers) or pack(self.images, self.numbers)


def refuse_second_derivatives() -> None:
    """Raise in a backward pass that is itself to be differentiated."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            "training with packed activations has no second derivatives (create_graph=True): run the forward pass "
            "within `with timm_qkformer.execution.execution_policy(packed=False):`"
        )


def _bits(numbers: Range) -> int:
    assert numbers.bits is not None
    return numbers.bits


def _pack_in_torch(flat: Tensor, numbers: Range) -> tuple[Tensor, None] | None:
    bits = _bits(numbers)
    shifted = flat - numbers.low if numbers.low else flat
    size = -(-len(flat) * bits // 8)
    total = shifted[:size].clone()  # in floating point: half precision, too, is exact up to 255
    for index in range(1, 8 // bits):
        chunk = shifted[index * size : (index + 1) * size]
        total[: len(chunk)].add_(chunk, alpha=2 ** (bits * index))
    data = total.to(torch.uint8)
    again = torch.empty_like(flat)
    _unpack_in_torch(data, numbers, again)
    fits = (again == flat).all()
    if flat.device.type == "cpu":
        return (data, None) if bool(fits) else None
    # Reading the answer would wait for the device; a wrong gradient must not pass either.
    torch._assert_async(fits, f"a layer's input is not {numbers} as declared; execution_policy(packed=False) allows it")
    return data, None


def _unpack_in_torch(data: Tensor, numbers: Range, flat: Tensor) -> None:
    bits, size = _layout(data, numbers)
    for index in range(8 // bits):
        chunk = flat[index * size : (index + 1) * size]
        part = data[: len(chunk)]
        chunk.copy_(part if bits == 8 else (part >> (bits * index)).bitwise_and_(2**bits - 1))
    if numbers.low:
        flat += numbers.low


def _layout(data: Tensor, numbers: Range) -> tuple[int, int]:
    """Bits an element, and elements from one bit position's to the next one's."""
    return _bits(numbers), len(data)


_FUNCTIONS: dict[str, list[Any]] = {
    **{f"pack_{name}": [POINTER, INT, POINTER, *[INT] * 4, POINTER, THREADS] for name in ("float32", "bfloat16")},
    **{f"unpack_{name}": [POINTER, *[INT] * 3, POINTER, INT, THREADS] for name in ("float32", "bfloat16", "uint8")},
}


def _kernel(name: str, x: Tensor) -> Callable[..., None] | None:
    name = f"{name}_{str(x.dtype).removeprefix('torch.')}"
    if name not in _FUNCTIONS or not may_run(x) or not training_kernels_pay():
        return None
    return function(name, __package__, "packing.cpp", _FUNCTIONS)


def _pack_natively(run: Callable[..., None], flat: Tensor, numbers: Range) -> tuple[Tensor, int] | None:
    bits = _bits(numbers)
    data = torch.empty(-(-len(flat) * bits // 8), dtype=torch.uint8)
    spikes = c_int64()
    operands = (bits, len(data), int(numbers.low), int(numbers.high), byref(spikes), torch.get_num_threads())
    run(flat.data_ptr(), len(flat), data.data_ptr(), *operands)
    return None if spikes.value < 0 else (data, spikes.value)


_warned: set[Range] = set()


def _warn(numbers: Range) -> None:
    if numbers in _warned:
        return
    _warned.add(numbers)
    warnings.warn(
        f"a layer's input should hold {numbers} by the way its network is built, and does not: a hook or a replaced "
        "module changes it. It is kept as it is, which costs memory; values and gradients are right.",
        RuntimeWarning,
        stacklevel=2,
    )
