"""AEDAT 4.0, iniVation's container, decoded by the package aedat, with checks that it does not make."""

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ...errors import import_extra
from ..events import EventFileError, Events
from .findings import Decoded, Findings

_CHUNK = 2**16


def open_aedat4(path: Path, file: BinaryIO, findings: Findings) -> Decoded:
    """Open the container, whose compression (none, LZ4, Zstandard) the package undoes packet by packet."""
    aedat = import_extra("aedat", "events", f"reading {path.name}")
    decoder = aedat.Decoder(path)
    kinds = decoder.id_to_stream()
    streams = {i: stream for i, stream in kinds.items() if stream["type"] == "events"}
    if len(streams) != 1:
        raise EventFileError(path, f"has {len(streams)} event streams, expected one")
    _check_packets(path, file, set(kinds))
    (stream,) = streams.values()
    size = (stream["height"], stream["width"])
    return Decoded("AEDAT 4.0", _decode(decoder), size, order="refuse", outside="refuse")


def _decode(decoder: Any) -> Iterator[Events]:
    for packet in decoder:
        records = packet.get("events", ())  # of one packet, which the package unpacks whole
        for start in range(0, len(records), _CHUNK):
            events = records[start : start + _CHUNK]
            x, y = (events[name].astype(np.int16) for name in "xy")
            yield Events(events["t"].astype(np.int64), x, y, events["on"].astype(np.bool_))


def _check_packets(path: Path, file: BinaryIO, streams: set[int]) -> None:
    """Each packet must be of a stream that the header names, and the last must end where the file says.

    A header of magic, size and a flatbuffer whose second field is the position of the table that ends the file, -1 if
    there is none; then packets of stream, size and content, all little-endian.
    """
    end = file.seek(0, 2)
    file.seek(14)
    (size,) = struct.unpack("<I", file.read(4))
    header = file.read(min(size, end))
    (root,) = struct.unpack_from("<I", header, 0)
    fields = root - struct.unpack_from("<i", header, root)[0]
    (offset,) = struct.unpack_from("<H", header, fields + 6)
    table = struct.unpack_from("<q", header, root + offset)[0] if offset else -1
    if table > end:
        raise EventFileError(path, f"is truncated: its table lies at byte {table}, the file has {end}")
    end = table if table >= 0 else end
    at = 18 + size
    while at < end:
        file.seek(at)
        stream, length = struct.unpack("<ii", file.read(8))
        if stream not in streams or length < 0:
            raise EventFileError(path, f"has a damaged packet at byte {at}: stream {stream}, {length} bytes")
        at += 8 + length
    if at != end:
        raise EventFileError(path, f"has a damaged packet: the last one ends at byte {at}, expected {end}")
