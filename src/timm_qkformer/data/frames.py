"""Events to frames: the clips that a model sees."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .events import Events

__all__ = ["FrameSpec", "events_to_frames"]


@dataclass(frozen=True)
class FrameSpec:
    """How a recording becomes frames.

    Attributes:
        time_steps: Number of frames, T.
        split_by: "number" gives every frame the same number of events, "time" the same duration.
        size: (height, width) of the frames; None keeps the sensor's. Only downwards, see `events_to_frames`.
    """

    time_steps: int
    split_by: str = "number"
    size: tuple[int, int] | None = None

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
