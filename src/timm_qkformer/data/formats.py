"""Files of event cameras: read, and checked for whatever their format makes checkable."""

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .arrays import ArrayFile
from .events import MOST_TIME, EventFileError, Events, check_events

_MOST_PIXELS = 2**31

# N-MNIST and N-Caltech101: a record at this row is none of the sensor's, but says that the clock has overflowed.
_OVERFLOW_ROW, _OVERFLOW_TIME = 240, 2**13


def read_events(path: str | Path) -> Events:
    """Read a recording; the suffix of the file decides how.

    - `.npz`: arrays t, x, y, p, as spikingjelly stores them. Polarities may be {0, 1}, {-1, 1} or bool.
    - `.bin`, `.bs2`: N-MNIST's and N-Caltech101's 5 bytes an event, see `_read_atis`.
    - `.aedat4`: iniVation's container, read by the package aedat (`pip install "timm-qkformer[events]"`).

    Raises:
        EventFileError: If the file is missing, empty, truncated or not of its format; in formats that cameras write,
            also if time runs backwards in it.
        ImportError: If the package that reads the format is not installed.
    """
    path = Path(path)
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise EventFileError(path, f"unknown suffix {path.suffix!r}, expected one of {', '.join(EVENT_SUFFIXES)}")
    if not path.is_file():
        raise EventFileError(path, "no such file")
    if path.stat().st_size == 0:
        raise EventFileError(path, "the file is empty (0 bytes)")
    try:
        events = reader(path)
    except OSError as error:
        raise EventFileError(path, f"cannot be read ({error})") from error
    except MemoryError as error:
        raise EventFileError(path, "is larger than the memory that is free") from error
    if len(events) == 0:
        raise EventFileError(path, "holds no events")
    return events


def _read_npz(path: Path) -> Events:
    try:
        with ArrayFile(path, ("t", "x", "y", "p")) as file:
            shapes = {name: header.shape for name, header in file.headers.items()}
            if len(set(shapes.values())) > 1 or len(shapes["t"]) != 1:
                raise EventFileError(path, f"t, x, y, p need to be vectors of one length, found shapes {shapes}")
            # One after the other: what was read is smaller before the next is.
            t = _whole_numbers(file.read("t"), "t", path, -MOST_TIME, MOST_TIME).astype(np.int64, copy=False)
            x, y = (
                _whole_numbers(file.read(name), name, path, 0, _MOST_PIXELS - 1).astype(np.int32, copy=False)
                for name in "xy"
            )
            p = file.read("p")
            if p.dtype != np.bool_:
                p = _whole_numbers(p, "p", path, -1, 1) > 0
    except EventFileError:
        raise
    except ValueError as error:
        raise EventFileError(path, f"is not a readable .npz file of events ({error})") from error
    return Events(t, x, y, p)


def _whole_numbers(values: NDArray[Any], name: str, path: Path, low: int, high: int) -> NDArray[Any]:
    """Integers, or floats that are whole numbers, from low to high, as they are: nothing has wrapped around yet.

    Timestamps in seconds must not pass for microseconds.
    """
    kind = values.dtype.kind
    if kind not in "iuf" or (kind == "f" and not _are_whole(values)):
        unit = "whole microseconds" if name == "t" else "whole numbers"
        found = f"{values.dtype} with fractions or non-numbers" if kind == "f" else str(values.dtype)
        raise EventFileError(path, f"{name} needs to be {unit}, found {found}")
    if values.size:
        first, last = int(values.min()), int(values.max())
        if first < low or last > high:
            what = {"t": "timestamps run", "p": "polarities run"}.get(name, f"{name} runs")
            wanted = "0 and 1, or -1 and 1" if name == "p" else f"{low} to {high}"
            raise EventFileError(path, f"{what} from {first} to {last}, expected {wanted}")
    return values


def _are_whole(values: NDArray[Any]) -> bool:
    chunks = (values[start : start + 2**16] for start in range(0, len(values), 2**16))
    return all(bool((np.isfinite(chunk) & (chunk == np.floor(chunk))).all()) for chunk in chunks)


def _read_atis(path: Path) -> Events:
    """Decode 40 bits an event: x (8), y (8), polarity (1), timestamp in microseconds (23), big-endian.

    The format of N-MNIST and N-Caltech101 (Orchard et al. 2015, "Converting Static Image Datasets to Spiking
    Neuromorphic Datasets"). A record at y = 240 is no event: all times from there on are 2^13 microseconds later, as in
    the authors' own reader.
    """
    raw = np.fromfile(path, dtype=np.uint8)
    if raw.size % 5:
        raise EventFileError(path, f"has {raw.size} bytes, not a multiple of 5: truncated, or not in N-MNIST's format")
    records = raw.reshape(-1, 5)
    t = (records[:, 2] & 0x7F).astype(np.int64)
    for byte in (3, 4):
        t <<= 8
        t |= records[:, byte]
    overflows = records[:, 1] == _OVERFLOW_ROW
    if overflows.any():
        t += np.cumsum(overflows, dtype=np.int64) * _OVERFLOW_TIME
        t, records = t[~overflows], records[~overflows]
    _check_order(t, path)
    return Events(t, records[:, 0].astype(np.int32), records[:, 1].astype(np.int32), records[:, 2] >= 0x80)


def _check_order(t: NDArray[np.int64], path: Path) -> None:
    """Cameras write events as they come, so that a time before the one before it is damage."""
    backwards = np.flatnonzero(t[1:] < t[:-1])
    if backwards.size:
        at = int(backwards[0])
        raise EventFileError(
            path,
            f"time runs backwards {backwards.size} times, first from {t[at]} to {t[at + 1]} microseconds at event "
            f"{at + 1}: the file is damaged or its events are not in order",
        )


def _read_aedat4(path: Path) -> Events:
    try:
        import aedat
    except ImportError as error:
        raise ModuleNotFoundError(
            f'reading {path.name} needs the package aedat: pip install "timm-qkformer[events]"', name="aedat"
        ) from error
    try:
        decoder = aedat.Decoder(path)
        kinds = decoder.id_to_stream()
        streams = {i: s for i, s in kinds.items() if s["type"] == "events"}
        if len(streams) != 1:
            raise EventFileError(path, f"has {len(streams)} event streams, expected one")
        _check_packets(path, set(kinds))
        packets = [packet["events"] for packet in decoder if "events" in packet]
    except EventFileError:
        raise
    # The decoder is Rust: corruption that it does not foresee is a panic, which derives from BaseException.
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise EventFileError(path, f"is not a readable .aedat4 file ({error})") from error
    (stream,) = streams.values()
    size = (stream["height"], stream["width"])
    if not packets:
        raise EventFileError(path, "holds no events")
    events = np.concatenate(packets)
    t = events["t"].astype(np.int64)
    _check_order(t, path)
    result = Events(t, events["x"].astype(np.int32), events["y"].astype(np.int32), events["on"].astype(np.bool_), size)
    if len(result):
        check_events(result, size, path)
    return result


def _check_packets(path: Path, streams: set[int]) -> None:
    """Each packet must be of a stream that the header names, and the last must end where the file says.

    A header of magic, size and a flatbuffer whose second field is the position of the table that ends the file, -1 if
    there is none; then packets of stream, size and content, all little-endian.
    """
    with path.open("rb") as file:
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


_READERS: dict[str, Callable[[Path], Events]] = {
    ".npz": _read_npz,
    ".bin": _read_atis,
    ".bs2": _read_atis,
    ".aedat4": _read_aedat4,
}
EVENT_SUFFIXES = tuple(_READERS)
