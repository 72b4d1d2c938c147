"""Windows of events: by count, by duration, by number of slices, from recordings or from a live source.

A source is whatever gives events in chunks: an open recording, `iter_events`, a camera's loop, a list. A chunk is
`Events`, or a structured array or a mapping with t, x, y and p. Whatever cuts a source into windows, here and in
`streaming`, does it by these rules:

- Events stay in the order in which they come, and each is in one window. Windows follow each other without a gap.
- A window is given as soon as it is complete, and what is kept in memory is the window that is not.
- By duration, the first window starts at the first event's time or at `start`. A window is complete when an event has
  come that is at or after its end. One in which nothing happens is a window as well; a million of them in a row are a
  damaged clock, an error. An event that comes later than its window is counted into the one at hand, and one warning
  at the end says how many did.
- By count, a window is complete with its last event. It ends at the latest time so far, the first one starts at the
  first event's time.
- What is left when the source ends makes a last window if it is asked for (`incomplete`).
"""

import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import islice, pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .events import MOST_TIME, Events, as_events
from .representations import REPRESENTATIONS, represent

Chunk = Events | NDArray[Any] | Mapping[str, Any]
Source = Iterable[Chunk]

_MOST_SILENT = 1_000_000  # windows without an event, one after the other


class Window(NamedTuple):
    """Events of a stretch of time, in microseconds: from `start` on and, by duration, before `end`."""

    start: int
    end: int
    events: Events  # may be none


def count_windows(source: Source | Chunk, count: int, incomplete: bool = False) -> Iterator[Window]:
    """Windows of so many events each.

    Args:
        source: Chunks of events, or one.
        count: Events of a window.
        incomplete: Whether what is left at the end is a window, too.

    Raises:
        ValueError: For a count below 1, or chunks that are no events.
    """
    return cut_source(source, None, count, incomplete=incomplete)


def time_windows(
    source: Source | Chunk, duration: int, start: int | None = None, incomplete: bool = False
) -> Iterator[Window]:
    """Windows of so many microseconds each, those in which nothing happens among them.

    Args:
        source: Chunks of events, or one.
        duration: Of a window, in microseconds.
        start: Of the first window; None takes the first event's time. Events before it are late.
        incomplete: Whether the last window, of which the end was not seen, is given, too.

    Raises:
        ValueError: For a duration below 1, chunks that are no events, or a million windows in which nothing happens:
            time jumps, or `duration` is in another unit.
    """
    return cut_source(source, duration, None, start=start, incomplete=incomplete)


def cut_source(
    source: Source | Chunk, duration: int | None, count: int | None, *, start: int | None = None, incomplete: bool
) -> Iterator[Window]:
    """The cutter behind all windows: of a duration or a count, one of them."""
    if (duration is None) == (count is None):
        raise ValueError(f"one of duration={duration} and count={count} needs to be given")
    for name, value in (("duration", duration), ("count", count)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 1):
            raise ValueError(f"{name}={value!r} needs to be a whole number of at least 1")
    ends = _ByDuration(int(duration), start) if duration is not None else _ByCount(int(count or 0))
    return _cut(source, ends, incomplete)


def _cut(source: Source | Chunk, ends: "_ByDuration | _ByCount", incomplete: bool) -> Iterator[Window]:
    parts: list[Events] = []  # of the window that is not complete
    for chunk in _chunks(source):
        begin = 0
        for stop, start, end in ends.complete(chunk):
            if stop > begin:
                parts.append(cut(chunk, begin, stop))
            yield Window(start, end, join(parts))
            parts, begin = [], stop
        if begin < len(chunk):
            parts.append(cut(chunk, begin, len(chunk)))
    if parts and incomplete:
        yield Window(*ends.last(), join(parts))
    if ends.late:
        warnings.warn(f"{ends.late:,} events came later than their window and were counted into the next", stacklevel=2)


class _ByDuration:
    """Where windows of a duration end."""

    def __init__(self, duration: int, start: int | None) -> None:
        self._duration, self._start = duration, start
        self._current = 0  # number of the window that is not complete
        self.late = 0  # events

    def complete(self, chunk: Events) -> Iterator[tuple[int, int, int]]:
        """How many events of the chunk lie before the end of each window that it completes, its start and its end."""
        if self._start is None:
            self._start = int(chunk.t[0])
        own = (chunk.t - self._start) // self._duration
        number = np.maximum.accumulate(np.maximum(own, self._current))
        self.late += int(np.count_nonzero(own < number))
        for edge in np.flatnonzero(np.diff(number, prepend=self._current)).tolist():
            silent = int(number[edge]) - self._current - 1
            if silent > _MOST_SILENT:
                raise ValueError(
                    f"time jumps by {(silent + 1) * self._duration} microseconds, {silent + 1} windows of "
                    f"duration={self._duration}"
                )
            for _ in range(silent + 1):
                yield edge, *self.last()
                self._current += 1

    def last(self) -> tuple[int, int]:
        """Start and end of the window that is not complete."""
        begin = (self._start or 0) + self._current * self._duration
        return begin, begin + self._duration


class _ByCount:
    """Where windows of a count end."""

    late = 0

    def __init__(self, count: int) -> None:
        self._count = count
        self._held = 0  # events of the window that is not complete
        self._start: int | None = None
        self._latest = -MOST_TIME

    def complete(self, chunk: Events) -> Iterator[tuple[int, int, int]]:
        """As `_ByDuration.complete`."""
        begin = 0
        if self._start is None:
            self._start = int(chunk.t[0])
        for stop in range(self._count - self._held, len(chunk) + 1, self._count):
            self._latest = max(self._latest, int(chunk.t[begin:stop].max()))
            yield stop, *self.last()
            self._start, begin = self._latest, stop
        self._held = (self._held + len(chunk)) % self._count
        if begin < len(chunk):
            self._latest = max(self._latest, int(chunk.t[begin:].max()))

    def last(self) -> tuple[int, int]:
        """As `_ByDuration.last`, with the latest event so far for the end."""
        return self._start or 0, self._latest


def slice_windows(events: Chunk, number: int, split_by: str = "number") -> list[Window]:
    """A whole recording in so many windows, as `events_to_frames` cuts it: "number" or "time" of the same size each."""
    events = as_events(events)
    if number < 1:
        raise ValueError(f"number={number} needs to be at least 1")
    if split_by not in ("number", "time"):
        raise ValueError(f"split_by={split_by!r} needs to be 'number' or 'time'")
    if split_by == "number":
        size = len(events) // number  # of fewer events than windows, the last one has all
        bounds = [*(i * size for i in range(number)), len(events)]
        parts = [cut(events, a, b) for a, b in pairwise(bounds)]
        return [Window(int(p.t[0]), int(p.t[-1]), p) if len(p) else Window(0, 0, p) for p in parts]
    first, last = int(events.t.min()), int(events.t.max())
    duration = max((last - first) // number, 1)
    step = np.minimum((events.t.astype(np.int64) - first) // duration, number - 1)
    return [
        Window(
            first + i * duration,
            last + 1 if i == number - 1 else first + (i + 1) * duration,
            Events(*(getattr(events, name)[step == i] for name in "txyp")),
        )
        for i in range(number)
    ]


def iter_clips(
    source: Source | Chunk,
    sensor_size: tuple[int, int],
    time_steps: int,
    *,
    duration: int | None = None,
    count: int | None = None,
    size: tuple[int, int] | None = None,
    representation: str = "counts",
) -> Iterator[NDArray[np.float32]]:
    """Clips [T, 2, h, w] of T windows each, one after the other, from a source of any length in constant memory.

        with open_events("long.raw") as recording:
            for clip in iter_clips(recording, recording.sensor_size, 16, duration=10_000, size=(128, 128)):
                ...

    Args:
        source: Chunks of events, or one.
        sensor_size: (height, width) of the camera.
        time_steps: T.
        duration: Of a window in microseconds, or
        count: events of a window; one of the two.
        size: (h, w) to sample down to; None keeps the sensor's.
        representation: Of a window: "counts", "binary" or "surface", see `representations`.
    """
    if time_steps < 1:
        raise ValueError(f"time_steps={time_steps} needs to be at least 1")
    if representation not in REPRESENTATIONS:
        raise ValueError(f"representation={representation!r} needs to be one of {', '.join(REPRESENTATIONS)}")
    windows = cut_source(source, duration, count, incomplete=False)
    while len(clip := list(islice(windows, time_steps))) == time_steps:
        yield np.stack([represent(window.events, sensor_size, size, representation, window.end) for window in clip])


def _chunks(source: Source | Chunk) -> Iterator[Events]:
    """Chunks that have an event, with times of one kind: signed and unsigned ones joined would become floats."""
    chunks: Any = source
    if isinstance(source, (Events, Mapping)) or (isinstance(source, np.ndarray) and source.dtype.names is not None):
        chunks = [source]
    for chunk in chunks:
        if len(chunk["t"] if isinstance(chunk, Mapping) and "t" in chunk else chunk):
            events = as_events(chunk)
            low, high = int(events.t.min()), int(events.t.max())
            if max(-low, high) > MOST_TIME:
                raise ValueError(f"timestamps run from {low} to {high} microseconds")
            yield replace(events, t=events.t.astype(np.int64, copy=False))


def cut(events: Events, start: int, stop: int) -> Events:
    """Events number `start` to before `stop`."""
    part = slice(start, stop)
    return Events(events.t[part], events.x[part], events.y[part], events.p[part], events.sensor_size)


def join(parts: list[Events]) -> Events:
    """Events one after the other; none for an empty list."""
    if not parts:
        empty = np.zeros(0, np.int16)
        return Events(empty.astype(np.int64), empty, empty, empty.astype(np.bool_))
    if len(parts) == 1:
        return parts[0]
    t, x, y, p = (np.concatenate([getattr(part, name) for part in parts]) for name in "txyp")
    return Events(t, x, y, p, parts[0].sensor_size)
