"""MATLAB's .mat of versions 5 to 7: vectors ts, x, y and pol, as ASL-DVS has them. 7.3 is HDF5, see `hdf5`.

Source: MathWorks, "MAT-File Format". Numeric arrays of real numbers are read; scipy reads more, and takes memory before
it knows what is there.
"""

import math
import os
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from ..arrays import MOST_BYTES, MOST_RATIO
from ..events import EventFileError, Events
from .columns import NAMES, Columns, find_columns
from .findings import Decoded, Findings

_MATRIX, _COMPRESSED = 14, 15
# kind of an element: dtype of its numbers
_NUMBERS = {1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 9: "f8", 12: "i8", 13: "u8"}
_NUMERIC_CLASSES = range(6, 16)
_COMPLEX = 0x800


def open_mat(path: Path, file: BinaryIO, findings: Findings) -> Decoded:
    """Read the vectors that are there under any of their usual names."""
    size = os.fstat(file.fileno()).st_size
    order = {b"IM": "<", b"MI": ">"}.get(file.read(128)[126:128])
    if order is None:
        raise EventFileError(path, "does not state its byte order: damaged")
    arrays: dict[str, NDArray[Any]] = {}
    budget = max(MOST_BYTES, MOST_RATIO * size)
    known = {name for names in NAMES.values() for name in names}
    while len(tag := file.read(8)) == 8:
        kind, length = struct.unpack(order + "II", tag)
        if length > size - file.tell():
            raise EventFileError(path, f"is truncated: a variable of {length} bytes at byte {file.tell()} of {size}")
        content = file.read(length)
        if kind == _COMPRESSED:
            unpacked = zlib.decompressobj()
            content = unpacked.decompress(content, budget)
            if unpacked.unconsumed_tail:
                raise EventFileError(path, f"{size} bytes that unpack to more than {MOST_RATIO} times as many")
            if not unpacked.eof:
                raise EventFileError(path, "is not a readable .mat file (a compressed variable has no end)")
            budget -= len(content)
            kind, length = struct.unpack_from(order + "II", content)
            if length > len(content) - 8:
                raise EventFileError(path, f"has a variable of {length} bytes in {len(content)}")
            content = content[8 : 8 + length]
        if kind == _MATRIX:
            name, array = _matrix(content, order)
            if array is not None and name.lower() in known:
                arrays[name] = array
    names = find_columns(arrays)
    if names is None:
        raise EventFileError(path, f"has the vectors {', '.join(arrays) or 'none'}, expected ts, x, y and pol")
    columns = [arrays[names[name]] for name in "txyp"]
    shapes = {name: column.shape for name, column in zip("txyp", columns, strict=True)}
    if len(set(shapes.values())) > 1 or columns[0].size != max(columns[0].shape, default=0):
        raise EventFileError(path, f"t, x, y, p need to be vectors of one length, found shapes {shapes}")
    events = Columns(path, findings, seconds=True)
    return Decoded(".mat", _decode([c.ravel() for c in columns], events), most_events=columns[0].size)


def _decode(columns: list[NDArray[Any]], events: Columns) -> Iterator[Events]:
    yield events(*columns)


def _matrix(content: bytes, order: str) -> tuple[str, NDArray[Any] | None]:
    """Name and numbers of a variable; None for what is no array of real numbers."""
    elements = _elements(content, order)
    flags, dimensions, letters = (next(elements) for _ in range(3))
    name = letters.tobytes().decode("latin-1")
    if int(flags[0]) & 0xFF not in _NUMERIC_CLASSES or int(flags[0]) & _COMPLEX:
        return name, None
    numbers = next(elements)
    shape = tuple(int(n) for n in dimensions)
    if min(shape, default=-1) < 0 or math.prod(shape) != numbers.size:
        raise ValueError(f"{name} has {numbers.size} numbers and the shape {shape}")
    return name, numbers.reshape(shape, order="F")


def _elements(content: bytes, order: str) -> Iterator[NDArray[Any]]:
    """Parts of a variable. Those of up to 4 bytes are packed into the tag."""
    at = 0
    while at + 8 <= len(content):
        kind, length = struct.unpack_from(order + "II", content, at)
        if kind >> 16:
            kind, length, start = kind & 0xFFFF, kind >> 16, at + 4
            at += 8
        else:
            start = at + 8
            at = start + length + -length % 8
        if kind not in _NUMBERS:
            raise ValueError(f"an element of kind {kind}")
        dtype = np.dtype(order + _NUMBERS[kind])
        if length > len(content) - start or length % dtype.itemsize:
            raise ValueError(f"an element of {length} bytes where {len(content) - start} are left")
        yield np.frombuffer(content, dtype, length // dtype.itemsize, start)
