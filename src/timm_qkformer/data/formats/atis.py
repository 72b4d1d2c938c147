"""N-MNIST's and N-Caltech101's .bin, and .bs2: 40 bits an event, without a header."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from ..events import EventFileError, Events
from .findings import Decoded, Findings

# A record at this row is none of the sensor's, but says that the clock has overflowed.
_OVERFLOW_ROW, _OVERFLOW_TIME = 240, 2**13
_CHUNK = 2**16


def open_atis(path: Path, file: BinaryIO, findings: Findings) -> Decoded:
    """Without a header, the file's size is all that can be checked before its events are read."""
    size = os.fstat(file.fileno()).st_size
    if size % 5:
        raise EventFileError(path, f"has {size} bytes, not a multiple of 5: truncated, or not in N-MNIST's format")
    return Decoded("N-MNIST's 40 bits an event", _decode(file, findings), most_events=size // 5, order="refuse")


def _decode(file: BinaryIO, findings: Findings) -> Iterator[Events]:
    """x (8), y (8), polarity (1), timestamp in microseconds (23), big-endian.

    Source: Orchard et al. 2015, "Converting Static Image Datasets to Spiking Neuromorphic Datasets". All times after a
    record at y = 240 are 2^13 microseconds later, as in the authors' own reader.
    """
    late = 0
    while len(raw := np.fromfile(file, np.uint8, 5 * _CHUNK)):
        records = raw.reshape(-1, 5)
        t = _times(records)
        overflows = records[:, 1] == _OVERFLOW_ROW
        if overflows.any():
            counts = np.cumsum(overflows, dtype=np.int64)
            t += (counts + late) * _OVERFLOW_TIME
            late += int(counts[-1])
            findings.note("the clock overflowed {n} times", int(counts[-1]))
            t, records = t[~overflows], records[~overflows]
        elif late:
            t += late * _OVERFLOW_TIME
        yield Events(t, records[:, 0].astype(np.int16), records[:, 1].astype(np.int16), records[:, 2] >= 0x80)


def _times(records: NDArray[np.uint8]) -> NDArray[np.int64]:
    t = (records[:, 2] & 0x7F).astype(np.int64)
    for byte in (3, 4):
        t <<= 8
        t |= records[:, byte]
    return t


def looks_like_atis(head: bytes, size: int) -> bool:
    """Whether a file of so many bytes that begins with `head` may be one by its times, which do not run back."""
    if size % 5 or not head:
        return False
    records = np.frombuffer(head[: len(head) - len(head) % 5], np.uint8).reshape(-1, 5)
    t = _times(records) + np.cumsum(records[:, 1] == _OVERFLOW_ROW) * _OVERFLOW_TIME
    return bool((np.diff(t[records[:, 1] != _OVERFLOW_ROW]) >= 0).all() and (records[:, 1] <= _OVERFLOW_ROW).all())
