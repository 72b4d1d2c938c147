"""Prophesee's .dat: a text header, two bytes of kind and size, then 8 bytes an event.

Source: docs.prophesee.ai, "DAT File Format". Version 1 is that of the first ATIS cameras.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

from ..events import EventFileError, Events
from .findings import Decoded, Findings, Unwrapper
from .prophesee import Words, read_header, read_words, sensor_size

_KINDS = (0x00, 0x0C)  # change detection, in the older and the newer numbering
_CHUNK = 2**16  # events
# bits of x, bits of y
_LAYOUTS = {"1": (9, 8), "2": (14, 14)}


def open_dat(path: Path, file: BinaryIO, findings: Findings) -> Decoded:
    """Read the header and the two bytes that follow it."""
    header = read_header(file)
    kind = file.read(2)
    if len(kind) < 2:
        raise EventFileError(path, "ends with its header: cut off")
    if kind[0] not in _KINDS or kind[1] != 8:
        raise EventFileError(
            path,
            f"holds records of kind {kind[0]} and {kind[1]} bytes, expected events of kind 0 or 12 and 8 bytes: it is "
            "not a .dat file, or it is damaged",
        )
    version = header.get("version", "2")
    if version not in _LAYOUTS:
        raise EventFileError(path, f"is a .dat file of version {version!r}: 1 and 2 are read")
    most = (os.fstat(file.fileno()).st_size - file.tell()) // 8
    words = read_words(file, "<u4", 2, _CHUNK, findings)
    return Decoded(f".dat version {version}", _decode(words, version, findings), sensor_size(header, path), most)


def _decode(chunks: Iterator[Words], version: str, findings: Findings) -> Iterator[Events]:
    """32 bits of time in microseconds, then x, y and the polarity from the lowest bit on."""
    x_bits, y_bits = _LAYOUTS[version]
    clock = Unwrapper(32, findings)
    for words in chunks:
        address = words[1::2]
        x = (address & ((1 << x_bits) - 1)).astype(np.int16)
        y = ((address >> x_bits) & ((1 << y_bits) - 1)).astype(np.int16)
        p = (address & (1 << (x_bits + y_bits))) != 0
        yield Events(clock(words[::2].astype(np.int64)), x, y, p)
