"""Open a file of events: find out by its content what it is, decode it in chunks, check what every format promises."""

import os
import re
import warnings
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import numpy as np

from ..events import EventFileError, Events, check_events
from .findings import PAUSE, Decoded, Findings

# Suffixes that a folder is searched for, and those of text, which may be anything else as well.
EVENT_SUFFIXES = (".npz", ".bin", ".bs2", ".aedat4", ".raw", ".dat", ".aedat", ".h5", ".hdf5", ".mat", ".npy")
TEXT_SUFFIXES = (".csv", ".txt")

_HEAD = 4096  # bytes that tell formats apart
_MOST_OUTSIDE = 20  # one event in so many off the sensor is damage; more, and size or format are wrong

Opener = Callable[[Path, BinaryIO, Findings], Decoded]

# format: module, function, suffixes that go with it
_FORMATS = {
    "npz": ("arrays", "open_npz", (".npz",)),
    "npy": ("arrays", "open_npy", (".npy",)),
    "hdf5": ("hdf5", "open_hdf5", (".h5", ".hdf5", ".mat")),
    "mat": ("mat", "open_mat", (".mat",)),
    "evt": ("prophesee", "open_raw", (".raw",)),
    "dat": ("dat", "open_dat", (".dat",)),
    "aedat2": ("aedat", "open_aedat2", (".aedat",)),
    "aedat3": ("aedat", "open_aedat3", (".aedat",)),
    "aedat4": ("aedat4", "open_aedat4", (".aedat4",)),
    "atis": ("atis", "open_atis", (".bin", ".bs2")),
    "text": ("text", "open_text", TEXT_SUFFIXES),
}
_TEXT = re.compile(rb"[\t\n\r\x20-\x7e]+")
_PERCENT_LINE = re.compile(rb"% [\t\x20-\x7e\x80-\xff]*\r?\n")
_UNKNOWN = (
    "the content is of no known format (Prophesee's .raw and .dat, AEDAT 2.0, 3.1 and 4, HDF5, MATLAB, NumPy, text, "
    "N-MNIST's .bin)"
)


class EventFileWarning(UserWarning):
    """A recording was read, and something about it was repaired or is odd."""


class Recording:
    """An open recording. Iterating gives its events in chunks, in the file's order and in constant memory, once.

    A context manager, see `open_events`. What the file's format allows to be checked is checked while it is read;
    `findings` counts what was found so far.
    """

    def __init__(self, path: Path, file: BinaryIO, decoded: Decoded, findings: Findings, warn: bool) -> None:
        self.path = path
        self.format = decoded.format
        self.sensor_size = decoded.sensor_size
        self.details = decoded.details
        self.most_events = decoded.most_events
        self.size = os.fstat(file.fileno()).st_size
        self.findings = findings
        self._file = file
        self._decoded = decoded
        self._warn = warn
        self._last: int | None = None  # time
        self._total = 0
        self._outside = 0

    def __enter__(self) -> "Recording":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._file.close()

    def __iter__(self) -> Iterator[Events]:
        """Chunks of at least one event.

        Raises:
            EventFileError: Where the file turns out to be damaged beyond what is repaired.
        """
        chunks = self._decoded.chunks
        while True:
            with _guarded(self.path, self.format):
                chunk = next(chunks, None)
                if chunk is not None:
                    chunk = self._checked(chunk)
            if chunk is None:
                break
            if len(chunk):
                yield chunk
        if self._total - self._outside < 1:
            raise EventFileError(self.path, f"holds no events{f' ({self.findings})' if self.findings else ''}")
        self._check_outside(self._total)
        if self.findings and self._warn:
            warnings.warn(f"{self.path}: {self.findings}", EventFileWarning, stacklevel=3)

    @property
    def progress(self) -> int:
        """Bytes of the file that have been read, of `size`; formats that libraries read say nothing before the end."""
        try:
            return self._file.tell()
        except ValueError:  # closed
            return self.size

    def _checked(self, chunk: Events) -> Events:
        if not len(chunk):
            return chunk
        self._check_time(chunk)
        self._total += len(chunk)
        size = self.sensor_size
        if size is None:
            return chunk
        if self._decoded.outside == "refuse":
            check_events(chunk, size, self.path)
        elif _reaches_outside(chunk, size):
            inside = (chunk.x >= 0) & (chunk.x < size[1]) & (chunk.y >= 0) & (chunk.y < size[0])
            lost = len(chunk) - int(np.count_nonzero(inside))
            self._outside += lost
            self.findings.add(f"{{n}} events off the sensor of (height, width) {size} were left out", lost)
            if self._total > 100_000:
                self._check_outside(self._total)
            chunk = Events(chunk.t[inside], chunk.x[inside], chunk.y[inside], chunk.p[inside], size)
        return Events(chunk.t, chunk.x, chunk.y, chunk.p, size)

    def _check_outside(self, total: int) -> None:
        if self._outside * _MOST_OUTSIDE > total:
            raise EventFileError(
                self.path,
                f"{self._outside:,} of {total:,} events lie outside the sensor of (height, width) {self.sensor_size}: "
                "the stated size is wrong, or the file is damaged",
            )

    def _check_time(self, chunk: Events) -> None:
        """Cameras write events as they come: a time before the one before it is damage, or a clock that was reset."""
        order = self._decoded.order
        if order == "any":
            return
        t = chunk.t
        last = int(t[0]) if self._last is None else self._last
        steps = t[1:] - t[:-1]
        seam = int(t[0]) - last
        self._last = int(t[-1])
        low, high = (int(steps.min()), int(steps.max())) if len(steps) else (0, 0)
        if min(low, seam) < 0:
            back = np.flatnonzero(steps < 0)
            count = len(back) + (seam < 0)
            if order == "refuse":
                first, before, after = (
                    (0, last, int(t[0])) if seam < 0 else (int(back[0]) + 1, int(t[back[0]]), int(t[back[0] + 1]))
                )
                raise EventFileError(
                    self.path,
                    f"time runs backwards {count} times, first from {before} to {after} microseconds at event "
                    f"{self._total + first}: the file is damaged or its events are not in order",
                )
            self.findings.add(
                "time runs backwards {n} times, at most by {most} microseconds; kept in the file's order",
                count,
                -min(low, seam),
            )
        if max(high, seam) > PAUSE:
            count = int(np.count_nonzero(steps > PAUSE)) + (seam > PAUSE)
            text = "time jumps forward by more than a minute {n} times, at most by {most} microseconds; kept"
            self.findings.add(text, count, max(high, seam))


def _reaches_outside(chunk: Events, size: tuple[int, int]) -> bool:
    low = min(int(chunk.x.min()), int(chunk.y.min()))
    return low < 0 or int(chunk.x.max()) >= size[1] or int(chunk.y.max()) >= size[0]


class _guarded:  # noqa: N801, a context manager that is cheaper than a generator: it is entered for each chunk
    """Whatever a decoder raises becomes an EventFileError, short of missing packages."""

    def __init__(self, path: Path, name: str) -> None:
        self.path, self.name = path, name

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is None or isinstance(error, (EventFileError, ImportError, GeneratorExit)):
            return
        if isinstance(error, MemoryError):
            raise EventFileError(self.path, "is larger than the memory that is free") from error
        if isinstance(error, OSError) and error.errno is not None:
            raise EventFileError(self.path, f"cannot be read ({error})") from error
        # Parsers in Rust panic with what derives from BaseException.
        if isinstance(error, Exception) or type(error).__name__ == "PanicException":
            words = str(error) or type(error).__name__
            raise EventFileError(self.path, f"is not a readable {self.name} file ({words[:300]})") from error


def open_events(path: str | Path, *, warn: bool = True) -> Recording:
    """Open a recording of any format; docs/events.md lists them, and what is done about damage in each.

        with open_events("night.raw") as recording:
            for events in recording:  # chunks, in constant memory
                ...

    Args:
        path: The file. Its content decides what it is, not its name.
        warn: Warn once, when all was read, with what was repaired and how often (`EventFileWarning`); without it,
            `recording.findings` says so.

    Raises:
        EventFileError: If the file is missing, empty, or of no format that is known.
        ImportError: If the package that reads the format is not installed.
    """
    path = Path(path)
    if not path.is_file():
        raise EventFileError(path, "no such file")
    findings = Findings()
    try:
        file = path.open("rb")
    except OSError as error:
        raise EventFileError(path, f"cannot be read ({error})") from error
    try:
        with _guarded(path, path.suffix.lower() or "event"):
            if os.fstat(file.fileno()).st_size == 0:
                raise EventFileError(path, "the file is empty (0 bytes)")
            name = sniff(file.read(_HEAD), path)
        with _guarded(path, _FORMATS[name][2][0]):
            file.seek(0)
            module, function, suffixes = _FORMATS[name]
            if path.suffix.lower() not in suffixes:
                known = path.suffix.lower() in (*EVENT_SUFFIXES, *TEXT_SUFFIXES)
                add = findings.add if known else findings.note
                add(f"the name ends in {path.suffix!r}, the content is that of {suffixes[0]}")
            opener: Opener = getattr(import_module(f".{module}", __package__), function)
            decoded = opener(path, file, findings)
    except BaseException:
        file.close()
        raise
    return Recording(path, file, decoded, findings, warn)


def sniff(head: bytes, path: Path) -> str:
    """Name of the format of a file that begins with `head`. The suffix counts where the content says nothing."""
    if head.startswith((b"\x89HDF\r\n\x1a\n", b"MATLAB 7.3 MAT-file")):
        return "hdf5"
    if head.startswith(b"PK\x03\x04"):
        return "npz"
    if head.startswith(b"\x93NUMPY"):
        return "npy"
    if head.startswith(b"MATLAB 5.0 MAT-file"):
        return "mat"
    if head.startswith(b"#!AER-DAT"):
        version = head[9:12]
        name = {b"2.0": "aedat2", b"3.1": "aedat3"}.get(version, "aedat4" if version.startswith(b"4") else None)
        if name is None:
            raise EventFileError(path, f"AEDAT {version.decode('ascii', 'replace')} is not read: 2.0, 3.1 and 4.0 are")
        return name
    if _PERCENT_LINE.match(head):
        return "evt" if re.search(rb"^% (evt|format EVT)", head, re.MULTILINE) else "dat"
    if _TEXT.fullmatch(head) and (b"\n" in head or path.suffix.lower() in TEXT_SUFFIXES):
        return "text"
    for name, (_, _, suffixes) in _FORMATS.items():
        if path.suffix.lower() in suffixes and name != "text":
            return name
    from .atis import looks_like_atis

    if looks_like_atis(head, path.stat().st_size):
        return "atis"
    if path.suffix.lower() in TEXT_SUFFIXES:
        raise EventFileError(path, f"is not text; {_UNKNOWN}")
    expected = ", ".join((*EVENT_SUFFIXES, *TEXT_SUFFIXES))
    raise EventFileError(path, f"{_UNKNOWN}, and unknown suffix {path.suffix!r}, expected one of {expected}")


def iter_events(path: str | Path) -> Iterator[Events]:
    """The events of a recording in chunks, in the file's order and in constant memory, see `open_events`."""
    with open_events(path) as recording:
        yield from recording


def read_events(path: str | Path) -> Events:
    """Read a whole recording into memory: 13 bytes an event for cameras' formats, 17 for arrays.

    Polarities may be {0, 1}, {-1, 1} or bool. What was repaired is said in one warning, see `open_events`.

    Raises:
        EventFileError: If the file is missing, empty, of no known format or damaged beyond repair.
        ImportError: If the package that reads the format is not installed.
    """
    with open_events(path) as recording:
        return gather(recording)


def gather(recording: Recording) -> Events:
    """All events of a recording that has just been opened."""
    try:
        if recording.most_events is None:
            return _concatenated(list(recording))
        return _filled(recording, recording.most_events)
    except MemoryError as error:
        raise EventFileError(recording.path, "is larger than the memory that is free") from error


def _concatenated(chunks: list[Events]) -> Events:
    if len(chunks) == 1:
        return chunks[0]
    columns = {name: [getattr(chunk, name) for chunk in chunks] for name in "txyp"}
    size = chunks[0].sensor_size
    chunks.clear()
    # One column after the other, so that the chunks of one are gone before the next is made.
    return Events(**{name: np.concatenate(columns.pop(name)) for name in "txyp"}, sensor_size=size)


def _filled(recording: Recording, most: int) -> Events:
    arrays: dict[str, np.ndarray] = {}
    count = 0
    size = None
    chunks = iter(recording)
    for chunk in chunks:
        if not arrays:
            if len(chunk) == most:
                list(chunks)  # to the end, for what is checked there
                return chunk
            arrays = {name: np.empty(most, getattr(chunk, name).dtype) for name in "txyp"}
        stop = count + len(chunk)
        for name, array in arrays.items():
            array[count:stop] = getattr(chunk, name)
        count, size = stop, chunk.sensor_size
    for array in arrays.values():
        array.resize(count, refcheck=False)  # gives memory back, which a view would not
    return Events(**arrays, sensor_size=size)
