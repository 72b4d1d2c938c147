"""AEDAT 2.0 (jAER) and 3.1 (cAER): text headers, then addresses and timestamps of 32 bits each.

Sources: docs.inivation.com, "AEDAT 2.0" and "AEDAT 3.1"; for AEDAT 2.0's polarities and mirrored axes jAER, which
writes these files: its rows count from below and its columns from the right, and a DVS128's bit 0 is set for "off".
"""

import os
import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from ..events import EventFileError, Events
from .findings import Decoded, Findings, Unwrapper
from .prophesee import Words, read_words

_MOST_HEADER = 2**24  # jAER writes its settings there
_CHUNK = 2**16

# Cameras by what their name begins with: (height, width).
SENSORS = {
    "dvs128": (128, 128),
    "davis128": (128, 128),
    "davis208": (192, 208),
    "davis240": (180, 240),
    "davis346": (260, 346),
    "dvs640": (480, 640),
    "davis640": (480, 640),
    "dvs132": (104, 132),
}


class _Layout(NamedTuple):
    """Where an address of AEDAT 2.0 has what: shift and mask of the column and the row, and the bit of the polarity."""

    x: tuple[int, int]
    y: tuple[int, int]
    polarity: int
    on: bool  # what that bit is for "on"
    others: int  # bits that are set in what is no event: triggers, samples of frames and motion


_DVS128 = _Layout((1, 0x7F), (8, 0x7F), 0, False, 0x8000)
_DAVIS = _Layout((12, 0x3FF), (22, 0x1FF), 11, True, 0x80000400)


def open_aedat2(path: Path, file: BinaryIO, findings: Findings) -> Decoded:
    """Read the header; the camera is the one that it names, or a DVS128 if no address is longer than 16 bits."""
    header = _header(file, b"#End Of ASCII Header")
    match = re.search(r"AEChip: *(?:[\w.]*\.)?(\w+)", header)
    size = _sensor(match[1]) if match else None
    if match and size is None:
        raise EventFileError(path, f"was recorded with {match[1]!r}; known are {', '.join(SENSORS)}")
    if size is None:
        start = file.tell()
        sample = np.frombuffer(file.read(2**16), ">u4")[::2] if _rest(file) % 4 == 0 else np.zeros(0, ">u4")
        file.seek(start)
        if (sample > 0xFFFF).any():
            raise EventFileError(path, "does not name its camera, and addresses are not those of a DVS128")
        size = SENSORS["dvs128"]
    layout = _DVS128 if size == SENSORS["dvs128"] else _DAVIS
    words = read_words(file, ">u4", 2, _CHUNK, findings)
    details = {"camera": match[1]} if match else {}
    return Decoded("AEDAT 2.0", _decode_aedat2(words, layout, size, findings), size, _rest(file) // 8, details=details)


def _decode_aedat2(
    chunks: Iterator[Words], layout: _Layout, size: tuple[int, int], findings: Findings
) -> Iterator[Events]:
    clock = Unwrapper(32, findings)
    for words in chunks:
        address, t = words[::2], clock(words[1::2].astype(np.int64))
        events = address & layout.others == 0
        if not events.all():
            address, t = address[events], t[events]
            findings.note("{n} records are no events of pixels", len(events) - len(t))
        x, y = (
            (side - 1 - ((address >> shift) & mask).astype(np.int16)).astype(np.int16)
            for side, (shift, mask) in ((size[1], layout.x), (size[0], layout.y))
        )
        yield Events(t, x, y, ((address >> layout.polarity) & 1).astype(bool) == layout.on)


def open_aedat3(path: Path, file: BinaryIO, findings: Findings) -> Decoded:
    """Read the header; packets are decoded one by one."""
    header = _header(file, b"#!END-HEADER")
    stated = re.search(r"^#Format: *(\S+)", header, re.MULTILINE)
    if stated and stated[1] != "RAW":
        raise EventFileError(path, f"is compressed ({stated[1]}): AEDAT 3.1 is read in the format RAW")
    sources = re.findall(r"^#Source \d+: *(\S+)", header, re.MULTILINE)
    size = _sensor(sources[0]) if len(set(sources)) == 1 else None
    details = {"camera": sources[0]} if sources else {}
    return Decoded("AEDAT 3.1", _decode_aedat3(path, file, findings), size, details=details)


def _decode_aedat3(path: Path, file: BinaryIO, findings: Findings) -> Iterator[Events]:
    """Polarity events are collected to chunks of some size, whatever packets they came in."""
    parts: list[bytes] = []
    overflows: list[tuple[int, int]] = []  # of the clock, and for how many events
    count = 0
    for content, overflow in _pieces(path, file, findings):
        parts.append(content)
        overflows.append((overflow, len(content) // 8))
        count += len(content) // 8
        if count >= _CHUNK:
            yield _polarity_events(b"".join(parts), overflows, findings)
            parts, overflows, count = [], [], 0
    if parts:
        yield _polarity_events(b"".join(parts), overflows, findings)


class _Packet(NamedTuple):
    kind: int
    source: int
    overflow: int  # of the clock
    records: int  # of polarity events alone, of those that are in the file
    padding: int  # bytes after these


def _pieces(path: Path, file: BinaryIO, findings: Findings) -> Iterator[tuple[bytes, int]]:
    """Records of polarity events (kind 1), of one packet at most so many, and the packet's overflow of the clock."""
    source: int | None = None
    while (packet := _packet(path, file, findings)) is not None:
        if packet.records:
            if source is not None and packet.source != source:
                raise EventFileError(path, f"has events of several cameras, the sources {source} and {packet.source}")
            source = packet.source
        for start in range(0, packet.records, _CHUNK):
            yield file.read(8 * min(_CHUNK, packet.records - start)), packet.overflow
        file.seek(packet.padding, os.SEEK_CUR)


def _packet(path: Path, file: BinaryIO, findings: Findings) -> _Packet | None:
    """The next packet, whose records follow in the file: a header of 28 bytes, then records. None at the end."""
    at, rest = file.tell(), _rest(file)
    head = file.read(28)
    if len(head) < 28:
        if head:
            _cut(len(head), findings)
        return None
    kind, source, size, offset, overflow, capacity, number, valid = struct.unpack("<hhiiiiii", head)
    sane = size > 0 and 0 <= offset < size and overflow >= 0 and 0 <= valid <= number <= capacity and kind >= 0
    if not sane or (kind == 1 and size != 8):
        stated = f"kind {kind}, {number} of {capacity} records of {size} bytes"
        raise EventFileError(path, f"has a damaged packet at byte {at}: {stated}")
    length = capacity * size
    there = min(length, rest - 28)
    if kind != 1:
        if there < length:
            _cut(rest, findings)
        return _Packet(kind, source, overflow, 0, there)
    records = min(there // 8, number)
    if there < length:
        _cut(there - 8 * records, findings)
        findings.add("the last packet lacks {n} events", (length - there) // 8)
    return _Packet(kind, source, overflow, records, there - 8 * records)


def _cut(length: int, findings: Findings) -> None:
    findings.add("the file is cut: {n} bytes at its end are no whole record and were left out", length)


def _polarity_events(content: bytes, overflows: list[tuple[int, int]], findings: Findings) -> Events:
    """Bit 0: valid, bit 1: polarity, 2-16: y, 17-31: x; then 31 bits of microseconds."""
    words = np.frombuffer(content, "<u4")
    address, t = words[::2], words[1::2].astype(np.int64)
    if any(overflow for overflow, _ in overflows):
        times, counts = np.array(overflows, np.int64).T
        t += np.repeat(times, counts) << 31
    valid = (address & 1).astype(bool)
    if not valid.all():
        findings.note("{n} events are marked as invalid by the camera's filters", len(t) - int(np.count_nonzero(valid)))
        address, t = address[valid], t[valid]
    x, y = ((address >> shift & 0x7FFF).astype(np.int16) for shift in (17, 2))
    return Events(t, x, y, address & 2 != 0)


def _header(file: BinaryIO, end: bytes) -> str:
    """Lines that begin with "#", up to `end` or the first other line, where the file then stands."""
    lines: list[bytes] = []
    length = 0
    while length < _MOST_HEADER:
        start = file.tell()
        line = file.readline(_MOST_HEADER)
        if not line.startswith(b"#") or not line.endswith(b"\n"):
            file.seek(start)
            break
        lines.append(line)
        length += len(line)
        if line.startswith(end):
            break
    return b"".join(lines).decode("utf-8", "replace").replace("\r", "")


def _sensor(name: str) -> tuple[int, int] | None:
    return next((size for prefix, size in SENSORS.items() if name.lower().startswith(prefix)), None)


def _rest(file: BinaryIO) -> int:
    return os.fstat(file.fileno()).st_size - file.tell()
