"""Recordings of event cameras: read from any file format, checked, counted into the frames that a model sees."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .cache import load_arrays


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

    t: NDArray[np.int64]  # timestamps in microseconds
    x: NDArray[np.int64]  # columns
    y: NDArray[np.int64]  # rows
    p: NDArray[np.bool_]  # polarities: True where brightness rose ("on")
    sensor_size: tuple[int, int] | None = None  # (height, width) if the file states it

    def __len__(self) -> int:
        return len(self.t)


def read_events(path: str | Path) -> Events:
    """Read a recording; the suffix of the file decides how.

    - `.npz`: arrays t, x, y, p, as spikingjelly stores them. Polarities may be {0, 1}, {-1, 1} or bool.
    - `.bin`, `.bs2`: N-MNIST's and N-Caltech101's 5 bytes an event, see `_read_atis`.
    - `.aedat4`: iniVation's container, read by the package aedat (`pip install "timm-qkformer[events]"`).

    Raises:
        EventFileError: If the file is missing, empty, truncated or not of its format.
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
    if len(events) == 0:
        raise EventFileError(path, "holds no events")
    return events


def check_events(events: Events, sensor_size: tuple[int, int], path: str | Path) -> None:
    """Raise EventFileError if an event lies outside a sensor of (height, width) pixels, or timestamps are nonsense."""
    first, last = int(events.t.min()), int(events.t.max())
    if last - first >= 2**62:  # 146,000 years; differences of int64 beyond it would wrap around
        raise EventFileError(path, f"timestamps run from {first} to {last} microseconds")
    for name, values, limit in (("y", events.y, sensor_size[0]), ("x", events.x, sensor_size[1])):
        low, high = int(values.min()), int(values.max())
        if low < 0 or high >= limit:
            raise EventFileError(
                path, f"{name} runs from {low} to {high}, outside the sensor of (height, width) {sensor_size}"
            )


def _read_npz(path: Path) -> Events:
    try:
        arrays = load_arrays(path, ("t", "x", "y", "p"))
    except ValueError as error:
        raise EventFileError(path, f"is not a readable .npz file of events ({error})") from error
    shapes = {key: array.shape for key, array in arrays.items()}
    if len(set(shapes.values())) > 1 or arrays["t"].ndim != 1:
        raise EventFileError(path, f"t, x, y, p need to be vectors of one length, found shapes {shapes}")
    t, x, y = (_whole_numbers(arrays[key], key, path) for key in "txy")
    p = arrays["p"] if arrays["p"].dtype == np.bool_ else _whole_numbers(arrays["p"], "p", path)
    if p.dtype != np.bool_ and p.size and not (-1 <= p.min() and p.max() <= 1):
        raise EventFileError(path, f"polarities run from {p.min()} to {p.max()}, expected 0 and 1, or -1 and 1")
    return Events(t, x, y, p > 0)


def _whole_numbers(values: NDArray[Any], name: str, path: Path) -> NDArray[np.int64]:
    """Take integers, and floats that are whole numbers; timestamps in seconds must not pass for microseconds."""
    if values.dtype.kind in "iu":
        return values.astype(np.int64)
    if values.dtype.kind != "f" or not np.array_equal(values, np.floor(values)) or not np.isfinite(values).all():
        unit = "whole microseconds" if name == "t" else "whole numbers"
        raise EventFileError(path, f"{name} needs to be {unit}, found {values.dtype} with fractions or non-numbers")
    return values.astype(np.int64)


def _read_atis(path: Path) -> Events:
    """Decode 40 bits an event: x (8), y (8), polarity (1), timestamp in microseconds (23), big-endian.

    The format of N-MNIST (Orchard et al. 2015, "Converting Static Image Datasets to Spiking Neuromorphic Datasets").
    """
    raw = np.fromfile(path, dtype=np.uint8)
    if raw.size % 5:
        raise EventFileError(path, f"has {raw.size} bytes, not a multiple of 5: truncated, or not in N-MNIST's format")
    x, y, high, middle, low = raw.reshape(-1, 5).astype(np.int64).T
    return Events(t=(high & 0x7F) << 16 | middle << 8 | low, x=x, y=y, p=high >= 0x80)


def _read_aedat4(path: Path) -> Events:
    try:
        import aedat
    except ImportError as error:
        raise ModuleNotFoundError(
            f'reading {path.name} needs the package aedat: pip install "timm-qkformer[events]"', name="aedat"
        ) from error
    try:
        decoder = aedat.Decoder(path)
        streams = {i: s for i, s in decoder.id_to_stream().items() if s["type"] == "events"}
        if len(streams) != 1:
            raise EventFileError(path, f"has {len(streams)} event streams, expected one")
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
    t, x, y = (events[key].astype(np.int64) for key in "txy")
    return Events(t, x, y, events["on"].astype(np.bool_), size)


_READERS: dict[str, Callable[[Path], Events]] = {
    ".npz": _read_npz,
    ".bin": _read_atis,
    ".bs2": _read_atis,
    ".aedat4": _read_aedat4,
}
EVENT_SUFFIXES = tuple(_READERS)


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


def events_to_frames(events: Events, spec: FrameSpec, sensor_size: tuple[int, int]) -> NDArray[np.uint32]:
    """Count the events of each polarity at each pixel in each of T slices of the recording.

    Slices are those of spikingjelly's `integrate_events_by_fixed_frames_number`, which the release trains on:

    - by number: N // T events each in the order of the file, the last slice takes the rest;
    - by time: (t_max - t_min) // T microseconds each, the last slice takes the rest. A slice in which nothing happens
      is an empty frame (spikingjelly raises IndexError there).

    Sampling down moves the event at (y, x) to (y * h // H, x * w // W): every event is counted once, and for whole
    ratios this is sum pooling.

    Args:
        events: At least one event, all of them on the sensor (`check_events`).
        spec: Number, kind and size of the frames.
        sensor_size: (height, width), (H, W) above.

    Returns:
        Counts [T, 2, h, w]; channel 0 counts "off" events and channel 1 "on" events.
    """
    steps = spec.time_steps
    height, width = spec.frame_size(sensor_size)
    if spec.split_by == "number":
        step = np.arange(len(events)) // max(len(events) // steps, 1)
        if len(events) < steps:
            step[:] = steps - 1
    else:
        elapsed = events.t - events.t.min()
        step = elapsed // max(int(elapsed.max()) // steps, 1)
    step = np.minimum(step, steps - 1)
    y = events.y * height // sensor_size[0]
    x = events.x * width // sensor_size[1]
    position = ((step * 2 + events.p) * height + y) * width + x
    counts = np.bincount(position, minlength=steps * 2 * height * width)
    return counts.reshape(steps, 2, height, width).astype(np.uint32)
