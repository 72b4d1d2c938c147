"""Events, recorded or as they come, cut into windows of the same duration or the same number of events."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..data import EventFileError, Events, FrameSpec, check_events, events_to_frames, read_events
from ..data.windows import cut, join

_MOST_EMPTY = 1_000_000  # windows in a row without an event; more are a damaged clock rather than silence

Packet = Events | NDArray[Any] | Mapping[str, Any]


@dataclass(frozen=True)
class Window:
    """The events of a stretch of time.

    Attributes:
        start, end: In microseconds, on the camera's clock: from `start` to before `end`; with a fixed number of events,
            from the last event of the window before to the last one of this.
        events: How many.
        frame: Their counts [1, 2, H, W] in float32, "off" first.
    """

    start: int
    end: int
    events: int
    frame: Tensor


def cut_windows(
    source: str | Path | Packet | Iterable[Packet],
    *,
    duration: int | None = None,
    count: int | None = None,
    sensor_size: tuple[int, int] | None = None,
    size: tuple[int, int] | None = None,
) -> Iterator[Window]:
    """Cut a recording, or what a camera sends, into windows, each as soon as it is complete.

    A window of fixed duration is complete when an event after it has come, so one in which nothing happens is given
    too, as an empty frame. What is left at the end makes a last window.

    Args:
        source: File of any format that `read_events` takes; a recording (`Events`, or a structured array or mapping as
            `events_to_frames` takes); or anything that gives such pieces of one, a camera's packets for instance.
        duration: Of each window, in microseconds.
        count: Events of each window, instead.
        sensor_size: (height, width) of the camera; None where the file or the first piece states it.
        size: (height, width) of frames, sampled down to; None: the sensor's.

    Raises:
        ValueError: For both a duration and a count or neither, no sensor size, time that runs backwards, or events off
            the sensor.
        EventFileError: For a file that cannot be used.
    """
    if (duration is None) == (count is None):
        raise ValueError(f"duration={duration} and count={count}: give one of them")
    for name, value in (("duration", duration), ("count", count)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise ValueError(f"{name}={value!r} must be an integer of at least 1")
    return _cut(_pieces(source, sensor_size), duration, count, size)


def _pieces(source: Any, sensor_size: tuple[int, int] | None) -> Iterator[Events]:
    """Pieces with events, whose sensor size is known, in order."""
    path = None
    if isinstance(source, (str, Path)):
        path = source
        source = read_events(path)
    whole = isinstance(source, (Events, np.ndarray, Mapping))
    last: int | None = None
    for packet in [source] if whole else source:
        events = _as_events(packet)
        if not len(events):
            continue
        if sensor_size is None:
            sensor_size = events.sensor_size
        if sensor_size is None:
            message = "does not state the camera's size: give sensor_size=(height, width)"
            raise ValueError(f"the stream {message}") if path is None else EventFileError(path, message)
        if path is not None:
            check_events(events, sensor_size, path)
        first = int(events.t[0])
        if (last is not None and first < last) or (events.t[1:] < events.t[:-1]).any():
            raise ValueError(f"time runs backwards in {path or 'the stream'}: windows need events in their order")
        last = int(events.t[-1])
        yield Events(events.t, events.x, events.y, events.p, sensor_size)


def _as_events(packet: Any) -> Events:
    if isinstance(packet, Events):
        return replace(packet, t=_signed(packet.t))
    names = packet.dtype.names if isinstance(packet, np.ndarray) else packet
    try:
        t, x, y, p = (np.asarray(packet[n]) for n in ("t", "x", "y", "on" if "on" in (names or ()) else "p"))
        return Events(_signed(t), x, y, p)
    except (KeyError, ValueError, IndexError) as error:
        raise ValueError(f"events need the fields t, x, y and p, found {names}") from error


def _signed(t: NDArray[Any]) -> NDArray[Any]:
    """Times of one kind: signed and unsigned ones joined would become floats. Floats are refused later."""
    return t.astype(np.int64) if t.dtype.kind in "iu" else t


def _cut(pieces: Iterator[Events], duration: int | None, count: int | None, size: tuple[int, int] | None) -> Any:
    held: Events | None = None  # events of the window that is not complete
    start = 0
    for piece in pieces:
        if held is None:
            start = int(piece.t[0])
        held = piece if held is None or not len(held) else join([held, piece])
        while True:
            if duration is not None:
                end = start + duration
                number = int(np.searchsorted(held.t, end))
                complete = number < len(held)
                if number == 0 and (int(held.t[0]) - start) // duration > _MOST_EMPTY:
                    gap = (int(held.t[0]) - start) * 1e-6
                    raise ValueError(f"there is no event for {gap:,.0f} s: more windows than {_MOST_EMPTY:,} are empty")
            else:
                assert count is not None
                number, complete = count, len(held) >= count
                end = int(held.t[count - 1]) if complete else 0
            if not complete:
                break
            yield _window(cut(held, 0, number), start, end, size, piece.sensor_size)
            held, start = cut(held, number, len(held)), end
            if not len(held):
                break
    if held is not None and len(held):
        end = start + duration if duration is not None else int(held.t[-1])
        yield _window(held, start, end, size, held.sensor_size)


def _window(
    events: Events, start: int, end: int, size: tuple[int, int] | None, sensor_size: tuple[int, int] | None
) -> Window:
    assert sensor_size is not None
    spec = FrameSpec(1, size=size)
    if len(events):
        frame = torch.from_numpy(events_to_frames(events, spec, sensor_size).astype(np.float32))
    else:
        frame = torch.zeros(1, 2, *spec.frame_size(sensor_size))
    return Window(start, end, len(events), frame)
