"""Recordings of event cameras: checked, and counted into the frames that a model sees."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

_CHUNK = 2**18  # events that are counted together, at least: counting then takes little memory beside the recording's
MOST_TIME = 2**62  # microseconds, 146,000 years; differences of two such times fit int64


class EventFileError(ValueError):
    """A recording that cannot be used: missing, corrupt, empty or not what its format promises."""

    def __init__(self, path: str | Path, reason: str) -> None:
        super().__init__(path, reason)  # as args, so that the error survives pickling on its way out of a worker
        self.path = Path(path)
        self.reason = reason  # without the path

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


@dataclass(frozen=True)
class Events:
    """A recording of N events, in the order of the file. All arrays are [N]."""

    t: NDArray[np.integer[Any]]  # timestamps in microseconds
    x: NDArray[np.integer[Any]]  # columns
    y: NDArray[np.integer[Any]]  # rows
    p: NDArray[np.bool_]  # polarities: True where brightness rose ("on")
    sensor_size: tuple[int, int] | None = None  # (height, width) if the file states it

    def __len__(self) -> int:
        return len(self.t)


def check_events(events: Events, sensor_size: tuple[int, int], path: str | Path) -> None:
    """Raise EventFileError if an event lies outside a sensor of (height, width) pixels, or timestamps are nonsense."""
    first, last = int(events.t.min()), int(events.t.max())
    if last - first >= MOST_TIME:
        raise EventFileError(path, f"timestamps run from {first} to {last} microseconds")
    for name, values, limit in (("y", events.y, sensor_size[0]), ("x", events.x, sensor_size[1])):
        low, high = int(values.min()), int(values.max())
        if low < 0 or high >= limit:
            raise EventFileError(
                path, f"{name} runs from {low} to {high}, outside the sensor of (height, width) {sensor_size}"
            )


@dataclass(frozen=True)
class FrameSpec:
    """How a recording becomes frames."""

    time_steps: int  # number of frames, T
    split_by: str = "number"  # every frame has the same number of events; "time": the same duration
    size: tuple[int, int] | None = None  # (height, width), not above the sensor's; None keeps that

    def __post_init__(self) -> None:
        if self.time_steps < 1:
            raise ValueError(f"time_steps={self.time_steps} needs to be at least 1")
        if self.split_by not in ("number", "time"):
            raise ValueError(f"split_by={self.split_by!r} needs to be 'number' or 'time'")
        if self.size is not None and (len(self.size) != 2 or min(self.size) < 1):
            raise ValueError(f"size={self.size} needs to be (height, width), both at least 1")

    def frame_size(self, sensor_size: tuple[int, int]) -> tuple[int, int]:
        """(height, width) of the frames of a sensor of (height, width) pixels."""
        if self.size is None:
            return sensor_size
        if self.size[0] > sensor_size[0] or self.size[1] > sensor_size[1]:
            raise ValueError(
                f"size={self.size} is larger than the sensor's {sensor_size}: frames are only sampled down, because "
                f"enlarging would leave rows and columns without events; resize the finished clips instead"
            )
        return self.size


def events_to_frames(
    events: Events | NDArray[Any] | Mapping[str, Any], spec: FrameSpec, sensor_size: tuple[int, int]
) -> NDArray[np.uint32]:
    """Count the events of each polarity at each pixel in each of T slices of the recording.

    Slices are those of spikingjelly's `integrate_events_by_fixed_frames_number`, which the release trains on:

    - by number: N // T events each in the order of the file, the last slice takes the rest;
    - by time: (t_max - t_min) // T microseconds each, the last slice takes the rest. A slice in which nothing happens
      is an empty frame (spikingjelly raises IndexError there).

    Sampling down moves the event at (y, x) to (y * h // H, x * w // W): every event is counted once, and for whole
    ratios this is sum pooling.

    Args:
        events: At least one event, all of them on the sensor: `Events`, a structured array with the fields t, x, y and
            p (or "on"), as tonic and aedat have them, or a mapping to such arrays. Integers of any width.
        spec: Number, kind and size of the frames.
        sensor_size: (height, width), (H, W) above.

    Returns:
        Counts [T, 2, h, w]; channel 0 counts "off" events and channel 1 "on" events.

    Raises:
        ValueError: For no events, events off the sensor, or arrays that are no whole numbers of one length.
    """
    events = as_events(events)
    steps, count = spec.time_steps, len(events)
    height, width = spec.frame_size(sensor_size)
    # As Python's integers, which do not wrap around.
    begin, end = int(events.t.min()), int(events.t.max())
    if max(-begin, end) > MOST_TIME:
        raise ValueError(f"timestamps run from {begin} to {end} microseconds")
    duration, number = max((end - begin) // steps, 1), max(count // steps, 1)
    counts = np.zeros(steps * 2 * height * width, dtype=np.int64)
    chunk = max(_CHUNK, len(counts))
    for start in range(0, count, chunk):
        part = slice(start, start + chunk)
        y = on_sensor(events.y[part], "y", sensor_size[0]) * height // sensor_size[0]
        x = on_sensor(events.x[part], "x", sensor_size[1]) * width // sensor_size[1]
        if spec.split_by == "time":
            step = (events.t[part].astype(np.int64) - begin) // duration
        elif count < steps:
            step = np.full(len(y), steps - 1)
        else:
            step = np.arange(start, start + len(y)) // number
        position = ((np.minimum(step, steps - 1) * 2 + (events.p[part] > 0)) * height + y) * width + x
        counts += np.bincount(position, minlength=len(counts))
    return counts.reshape(steps, 2, height, width).astype(np.uint32)


def as_events(events: Events | NDArray[Any] | Mapping[str, Any]) -> Events:
    """Events in any of the forms that `events_to_frames` takes, in the dtypes that they have."""
    if not isinstance(events, Events):
        found = events.dtype.names if isinstance(events, np.ndarray) else tuple(events)
        names = {"t": "t", "x": "x", "y": "y", "p": "on" if "on" in (found or ()) else "p"}
        missing = [name for name in names.values() if name not in (found or ())]
        if missing:
            raise ValueError(f"events lack the fields {', '.join(missing)}; found {found}, expected t, x, y and p")
        t, x, y, p = (np.asarray(events[names[name]]) for name in "txyp")
        events = Events(t, x, y, p)
    arrays = {"t": events.t, "x": events.x, "y": events.y, "p": events.p}
    wrong: dict[str, Any] = {
        name: f"{a.dtype} {list(a.shape)}" for name, a in arrays.items() if a.dtype.kind not in "iub"
    }
    if wrong or len({array.shape for array in arrays.values()}) > 1 or events.t.ndim != 1:
        shapes = wrong or {name: list(array.shape) for name, array in arrays.items()}
        raise ValueError(f"events need to be vectors of one length, of whole numbers of an integer dtype, got {shapes}")
    if len(events) == 0:
        raise ValueError("there are no events to count")
    return events


def on_sensor(values: NDArray[Any], name: str, limit: int) -> NDArray[np.int64]:
    """Coordinates as numbers to compute with; ValueError if one is not below `limit`, the sensor's."""
    low, high = int(values.min()), int(values.max())
    if low < 0 or high >= limit:
        raise ValueError(f"{name} runs from {low} to {high}, outside of a sensor with {limit} of them (sensor_size)")
    return values.astype(np.int64)
