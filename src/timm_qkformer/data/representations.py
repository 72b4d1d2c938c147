"""What a model sees of a window of events: counts, time surfaces, voxel grids; as functions, and as tonic's transforms.

tonic (https://tonic.readthedocs.io) has transforms that take a structured array and return an array. `ToFrames`,
`ToTimeSurface` and `ToVoxelGrid` are such transforms: put them into `tonic.transforms.Compose` or a data set of tonic.
Note that tonic's sensor_size is (width, height, polarities), this package's (height, width).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .events import Events, FrameSpec, as_events, events_to_frames, on_sensor

REPRESENTATIONS = ("counts", "binary", "surface")
DECAY = 50_000.0  # microseconds


def represent(
    events: Events,
    sensor_size: tuple[int, int],
    size: tuple[int, int] | None = None,
    representation: str = "counts",
    at: int | None = None,
) -> NDArray[np.float32]:
    """A window as [2, h, w], "off" events first; of no events, zeros.

    Args:
        events: On the sensor.
        sensor_size: (height, width) of the camera.
        size: (h, w) to sample down to; None keeps the sensor's.
        representation: "counts", "binary" (1 where something happened) or "surface" (`time_surface`).
        at: Time that a surface is seen at.
    """
    height, width = FrameSpec(1, size=size).frame_size(sensor_size)
    if representation == "surface":
        return time_surface(events, sensor_size, size, at=at)
    counts = np.bincount(_positions(events, sensor_size, (height, width)), minlength=2 * height * width)
    frames = counts.reshape(2, height, width).astype(np.float32)
    return np.minimum(frames, 1) if representation == "binary" else frames


def time_surface(
    events: Events | NDArray[Any] | Mapping[str, Any],
    sensor_size: tuple[int, int],
    size: tuple[int, int] | None = None,
    decay: float = DECAY,
    at: int | None = None,
) -> NDArray[np.float32]:
    """exp(-(at - t) / decay), t the time of the last event of each pixel and polarity; 0 where there was none.

    Source: Lagorce et al. 2017, "HOTS: A Hierarchy of Event-Based Time-Surfaces for Pattern Recognition", eq. 3.

    Args:
        events: On the sensor.
        sensor_size: (height, width) of the camera.
        size: (h, w) to sample down to; None keeps the sensor's.
        decay: Time constant in microseconds.
        at: Time in microseconds; None takes the last event's. Later events count as at this time.

    Returns:
        [2, h, w], "off" events first.
    """
    if not decay > 0:
        raise ValueError(f"decay={decay} needs to be above 0 microseconds")
    height, width = FrameSpec(1, size=size).frame_size(sensor_size)
    surface = np.zeros(2 * height * width, np.float32)
    if _is_empty(events):
        return surface.reshape(2, height, width)
    events = as_events(events)
    age = (int(events.t.max()) if at is None else at) - events.t.astype(np.int64)
    values = np.exp(-np.maximum(age, 0) / decay).astype(np.float32)
    np.maximum.at(surface, _positions(events, sensor_size, (height, width)), values)
    return surface.reshape(2, height, width)


def voxel_grid(
    events: Events | NDArray[Any] | Mapping[str, Any],
    sensor_size: tuple[int, int],
    bins: int,
    size: tuple[int, int] | None = None,
    signed: bool = False,
) -> NDArray[np.float32]:
    """Events spread over the two nearest of B moments, linearly in time.

    Source: Zhu et al. 2019, "Unsupervised Event-based Learning of Optical Flow, Depth, and Egomotion", eq. 1 and 2.

    Args:
        events: On the sensor.
        sensor_size: (height, width) of the camera.
        bins: B, at least 2: the first and the last event's moments, and those between.
        size: (h, w) to sample down to; None keeps the sensor's.
        signed: One channel in which "off" events count as -1, as in the paper.

    Returns:
        [B, 2, h, w], "off" events first, a clip of B steps; signed: [B, h, w].
    """
    if bins < 2:
        raise ValueError(f"bins={bins} needs to be at least 2")
    height, width = FrameSpec(1, size=size).frame_size(sensor_size)
    grid = np.zeros((bins, 2, height, width), np.float32)
    if not _is_empty(events):
        events = as_events(events)
        t = events.t.astype(np.int64)
        first, last = int(t.min()), int(t.max())
        place = (t - first) * ((bins - 1) / max(last - first, 1))
        below = np.minimum(np.floor(place).astype(np.int64), bins - 2)
        share = place - below
        position = below * (2 * height * width) + _positions(events, sensor_size, (height, width))
        flat = grid.reshape(-1)
        for where, weights in ((position, 1 - share), (position + 2 * height * width, share)):
            flat += np.bincount(where, weights, len(flat)).astype(np.float32)
    return grid[:, 1] - grid[:, 0] if signed else grid


def as_clip(frames: NDArray[Any] | Tensor) -> Tensor:
    """Frames that others made, such as `tonic.transforms.ToFrame`, as a clip [T, 2, H, W], float32.

    Args:
        frames: [T, 2, H, W], "off" events first, as tonic's are, or [T, H, W, 2] of any dtype.

    Raises:
        ValueError: For other shapes, such as frames of a single polarity.
    """
    clip = torch.as_tensor(np.ascontiguousarray(frames) if isinstance(frames, np.ndarray) else frames)
    if clip.ndim == 4 and clip.shape[1] != 2 and clip.shape[3] == 2:
        clip = clip.permute(0, 3, 1, 2)
    if clip.ndim != 4 or clip.shape[1] != 2:
        raise ValueError(f"frames of shape {list(clip.shape)}, expected [T, 2, H, W]: both polarities, one clip")
    return clip.to(torch.float32)


@dataclass(frozen=True)
class ToFrames:
    """A transform: a recording to counts [T, 2, h, w], see `events_to_frames`."""

    sensor_size: tuple[int, int]
    time_steps: int
    split_by: str = "number"
    size: tuple[int, int] | None = None

    def __call__(self, events: Events | NDArray[Any] | Mapping[str, Any]) -> NDArray[np.float32]:
        spec = FrameSpec(self.time_steps, self.split_by, self.size)
        return events_to_frames(events, spec, self.sensor_size).astype(np.float32)


@dataclass(frozen=True)
class ToTimeSurface:
    """A transform: a recording to [2, h, w], see `time_surface`."""

    sensor_size: tuple[int, int]
    decay: float = DECAY
    size: tuple[int, int] | None = None

    def __call__(self, events: Events | NDArray[Any] | Mapping[str, Any]) -> NDArray[np.float32]:
        return time_surface(events, self.sensor_size, self.size, self.decay)


@dataclass(frozen=True)
class ToVoxelGrid:
    """A transform: a recording to [B, 2, h, w], see `voxel_grid`."""

    sensor_size: tuple[int, int]
    bins: int
    size: tuple[int, int] | None = None

    def __call__(self, events: Events | NDArray[Any] | Mapping[str, Any]) -> NDArray[np.float32]:
        return voxel_grid(events, self.sensor_size, self.bins, self.size)


def _is_empty(events: Events | NDArray[Any] | Mapping[str, Any]) -> bool:
    return len(events["t"] if isinstance(events, Mapping) else events) == 0


def _positions(events: Events, sensor_size: tuple[int, int], size: tuple[int, int]) -> NDArray[np.int64]:
    """Where each event is in [2, h, w], flattened."""
    if len(events) == 0:
        return np.zeros(0, np.int64)
    y = on_sensor(events.y, "y", sensor_size[0]) * size[0] // sensor_size[0]
    x = on_sensor(events.x, "x", sensor_size[1]) * size[1] // sensor_size[1]
    return ((events.p > 0) * size[0] + y) * size[1] + x
