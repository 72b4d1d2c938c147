"""Events, recorded or as they come, cut into windows of the same duration or the same number of events."""

import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from ..data import EventFileError, Events, Recording, check_events, open_events
from ..data.representations import represent
from ..data.windows import Window as EventWindow
from ..data.windows import cut_source

Packet = Events | NDArray[Any] | Mapping[str, Any]


@dataclass(frozen=True)
class Window:
    """The events of a stretch of time, counted.

    Attributes:
        start, end: In microseconds, on the camera's clock: from `start` to before `end`; with a fixed number of events,
            from the end of the window before to the last event of this one.
        events: How many.
        frame: Their counts [1, 2, H, W] in float32, "off" first.
        seconds: What counting them took.
    """

    start: int
    end: int
    events: int
    frame: Tensor
    seconds: float = field(default=0.0, compare=False, repr=False)


def cut_windows(
    source: str | Path | Packet | Iterable[Packet],
    *,
    duration: int | None = None,
    count: int | None = None,
    sensor_size: tuple[int, int] | None = None,
    size: tuple[int, int] | None = None,
) -> Iterator[Window]:
    """Cut a recording, or what a camera sends, into windows, each as soon as it is complete.

    The rules are those of `data.windows`, and what is left at the end makes a last window. Files are read in chunks, in
    constant memory.

    Args:
        source: File of any format that `open_events` takes, or what that gives; a recording (`Events`, or a structured
            array or mapping as `events_to_frames` takes); or anything that gives such pieces of one, a camera's packets
            for instance.
        duration: Of each window, in microseconds.
        count: Events of each window, instead.
        sensor_size: (height, width) of the camera; None where the file or the first piece states it.
        size: (height, width) of frames, sampled down to; None: the sensor's.

    Raises:
        ValueError: For both a duration and a count or neither, no sensor size, a million windows without an event, or
            events off the sensor.
        EventFileError: For a file that cannot be used.
    """
    if not isinstance(source, (str, Path)):
        chunks = _checked(source, sensor_size) if isinstance(source, Recording) else source
        return _counted(cut_source(chunks, duration, count, incomplete=True), sensor_size, size)
    cut_source((), duration, count, incomplete=True)  # what is wrong is said before the file is opened
    return _from_file(source, duration, count, sensor_size, size)


def _from_file(path: str | Path, duration: Any, count: Any, sensor_size: Any, size: Any) -> Iterator[Window]:
    with open_events(path) as recording:
        yield from cut_windows(recording, duration=duration, count=count, sensor_size=sensor_size, size=size)


def _checked(recording: Recording, sensor_size: tuple[int, int] | None) -> Iterator[Events]:
    size = sensor_size or recording.sensor_size
    if size is None:
        raise EventFileError(recording.path, "does not state the camera's size: give sensor_size=(height, width)")
    for chunk in recording:
        if size != recording.sensor_size:
            check_events(chunk, size, recording.path)
        yield chunk


def _counted(
    windows: Iterable[EventWindow], sensor_size: tuple[int, int] | None, size: tuple[int, int] | None
) -> Iterator[Window]:
    for start, end, events in windows:
        begin = time.perf_counter()
        sensor_size = sensor_size or events.sensor_size
        if sensor_size is None:
            raise ValueError("the stream does not state the camera's size: give sensor_size=(height, width)")
        frame = torch.from_numpy(represent(events, sensor_size, size)).unsqueeze(0)
        yield Window(start, end, len(events), frame, time.perf_counter() - begin)
