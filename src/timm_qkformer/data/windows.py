"""Windows of events: by count, by duration, by number of slices, from recordings or from a live source.

A source is whatever gives events in chunks: an open recording, `iter_events`, a camera's loop, a list. A chunk is
`Events`, or a structured array or a mapping with t, x, y and p. Windows are given as soon as they are complete; what is
kept in memory is the window that is not.
"""

import warnings
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice, pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .events import Events, as_events
from .representations import REPRESENTATIONS, represent

Chunk = Events | NDArray[Any] | Mapping[str, Any]
Source = Iterable[Chunk]

_MOST_SILENT = 100_000  # windows without an event, one after the other


class Window(NamedTuple):
    """Events from `start` on and before `end`, in microseconds."""

    start: int
    end: int
    events: Events  # may be none


def count_windows(source: Source | Chunk, count: int, incomplete: bool = False) -> Iterator[Window]:
    """Windows of so many events each.

    Args:
        source: Chunks of events, or one.
        count: Events of a window.
        incomplete: Whether what is left at the end is a window, too.

    Returns:
        Windows from their first event's time to the next one's, the last to its own last event's.
    """
    if count < 1:
        raise ValueError(f"count={count} needs to be at least 1")
    parts: list[Events] = []
    held = 0
    for chunk in _chunks(source):
        start = 0
        while held + len(chunk) - start >= count:
            stop = start + count - held
            whole = join([*parts, cut(chunk, start, stop)])
            yield Window(int(whole.t[0]), int(whole.t[-1]), whole)
            parts, held, start = [], 0, stop
        if start < len(chunk):
            parts.append(cut(chunk, start, len(chunk)))
            held += len(chunk) - start
    if parts and incomplete:
        whole = join(parts)
        yield Window(int(whole.t[0]), int(whole.t[-1]), whole)


def time_windows(
    source: Source | Chunk, duration: int, start: int | None = None, incomplete: bool = False
) -> Iterator[Window]:
    """Windows of so many microseconds each, those in which nothing happens among them.

    An event whose time lies before the window at hand is counted into this one; a warning at the end says how many did.

    Args:
        source: Chunks of events, or one.
        duration: Of a window, in microseconds.
        start: Of the first window; None takes the first event's time. Events before it are late.
        incomplete: Whether the last window, of which the end was not seen, is given, too.

    Raises:
        ValueError: If nothing happens for 100,000 windows: time jumps, or `duration` is in another unit.
    """
    if duration < 1:
        raise ValueError(f"duration={duration} needs to be at least 1 microsecond")
    parts: list[Events] = []
    current, late = 0, 0
    for chunk in _chunks(source):
        if start is None:
            start = int(chunk.t[0])
        own = (chunk.t.astype(np.int64) - start) // duration
        number = np.maximum.accumulate(np.maximum(own, current))
        late += int(np.count_nonzero(own < number))
        edges = np.flatnonzero(np.diff(number, prepend=current))
        begin = 0
        for edge in edges.tolist():
            if edge > begin:
                parts.append(cut(chunk, begin, edge))
            following = int(number[edge])
            if following - current > _MOST_SILENT:
                raise ValueError(
                    f"time jumps by {(following - current) * duration} microseconds, {following - current} windows of "
                    f"duration={duration}"
                )
            yield _window(start, duration, current, parts)
            for silent in range(current + 1, following):
                yield _window(start, duration, silent, [])
            parts, current, begin = [], following, edge
        parts.append(cut(chunk, begin, len(chunk)))
    if parts and incomplete and start is not None:
        yield _window(start, duration, current, parts)
    if late:
        warnings.warn(f"{late:,} events came later than their window and were counted into the next", stacklevel=2)


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
    if (duration is None) == (count is None):
        raise ValueError(f"one of duration={duration} and count={count} needs to be given")
    if time_steps < 1:
        raise ValueError(f"time_steps={time_steps} needs to be at least 1")
    if representation not in REPRESENTATIONS:
        raise ValueError(f"representation={representation!r} needs to be one of {', '.join(REPRESENTATIONS)}")
    windows = time_windows(source, duration) if duration is not None else count_windows(source, count or 0)
    while len(clip := list(islice(windows, time_steps))) == time_steps:
        yield np.stack([represent(window.events, sensor_size, size, representation, window.end) for window in clip])


def _chunks(source: Source | Chunk) -> Iterator[Events]:
    """Chunks that have an event."""
    chunks: Any = source
    if isinstance(source, (Events, Mapping)) or (isinstance(source, np.ndarray) and source.dtype.names is not None):
        chunks = [source]
    for chunk in chunks:
        if len(chunk["t"] if isinstance(chunk, Mapping) else chunk):
            yield as_events(chunk)


def _window(start: int, duration: int, number: int, parts: list[Events]) -> Window:
    begin = start + number * duration
    return Window(begin, begin + duration, join(parts))


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
