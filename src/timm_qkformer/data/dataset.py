"""Recordings as a map-style data set of clips."""

import logging
import os
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from .cache import FrameCache
from .events import EventFileError, Events, FrameSpec, check_events, events_to_frames
from .formats import EventFileWarning
from .formats.recording import gather, open_events

_logger = logging.getLogger(__name__)
_NAMED = 10  # how many bad recordings a message names


class EventDataset(Dataset):
    """Clips of recorded events: `dataset[i]` is (frames float32 [T, 2, H, W], class index).

    Every recording is read once when the data set is created, so that a bad one is found then and not in the middle of
    an epoch. With `cache_dir` the frames made on the way are kept, and the next creation only reads what is new.
    Afterwards `recordings` holds those that are used, `skipped` by path what was wrong with each one left out, and
    `repaired` what was repaired in others, of which one warning tells.

    Args:
        recordings: (path, class index) of each recording, in any format of `read_events`.
        class_names: Name of each class.
        spec: Number, kind and size of the frames.
        sensor_size: (height, width) of the camera. Needed where files do not state it, see docs/events.md.
        on_error: What to do about recordings that are corrupt, empty or missing. "raise" refuses the data set and names
            them; "skip" leaves them out with one warning that names and counts them.
        cache_dir: Folder for finished frames; None makes them anew each time.
        transform: Applied to each clip [T, 2, H, W], such as `EventAugment`.
        orient: What is done to events before they are counted: "transpose" exchanges columns and rows, "rotate" turns
            the picture by 180 degrees; "" leaves it.

    `split` says in words which part of a data set this is, where that is known.

    Raises:
        ValueError: If there are no recordings, none is usable, some are not and on_error="raise", or cameras of several
            sizes would give frames of several shapes.
    """

    def __init__(
        self,
        recordings: Sequence[tuple[Path, int]],
        class_names: Sequence[str],
        spec: FrameSpec,
        sensor_size: tuple[int, int] | None = None,
        on_error: str = "raise",
        cache_dir: str | Path | None = None,
        transform: Callable[[Tensor], Tensor] | None = None,
        orient: str = "",
    ) -> None:
        if orient not in ("", "transpose", "rotate"):
            raise ValueError(f"orient={orient!r} needs to be '', 'transpose' or 'rotate'")
        if on_error not in ("raise", "skip"):
            raise ValueError(f"on_error={on_error!r} needs to be 'raise' or 'skip'")
        if not recordings:
            raise ValueError("there are no recordings")
        if sensor_size is not None:
            spec.frame_size(sensor_size)
        self.class_names = tuple(class_names)
        self.spec = spec
        self.sensor_size = sensor_size
        self.on_error = on_error
        self.cache = None if cache_dir is None else FrameCache(cache_dir)
        self.transform = transform
        self.orient = orient
        self.split = ""
        self.skipped: dict[Path, str] = {}
        self.repaired: dict[Path, str] = {}
        self.recordings = self._usable(recordings)

    @property
    def targets(self) -> list[int]:
        """Class index of each recording."""
        return [target for _, target in self.recordings]

    def __len__(self) -> int:
        return len(self.recordings)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """Return the clip and its class index.

        A recording that has become unreadable since the data set was created raises EventFileError, or with
        on_error="skip" gives way to the next readable one, with a warning: batches keep their size.
        """
        if not -len(self) <= index < len(self):
            raise IndexError(f"index {index} is out of range for {len(self)} recordings")
        for offset in range(len(self)):
            path, target = self.recordings[(index + offset) % len(self)]
            try:
                frames = self.frames(path)
                break
            except EventFileError as error:
                if self.on_error == "raise":
                    raise
                self.skipped[path] = error.reason
                warnings.warn(f"skipped in this epoch, the next recording takes its place: {error}", stacklevel=2)
        else:
            raise ValueError(f"none of the {len(self)} recordings can be read any more: {_named(self.skipped)}")
        clip = torch.from_numpy(frames.astype(np.float32))
        return (clip if self.transform is None else self.transform(clip)), target

    def frames(self, path: Path) -> NDArray[np.unsignedinteger]:
        """Counts [T, 2, H, W] of a recording, from the cache if there is one."""
        if self.cache is None:
            return self._count(path)
        try:
            return self.cache.get(path, self._parameters(), lambda: self._count(path))
        except FileNotFoundError as error:
            raise EventFileError(path, "no such file") from error
        except OSError as error:
            raise EventFileError(path, f"cannot be read ({error.strerror or error})") from error

    def _parameters(self) -> dict[str, object]:
        oriented = {"orient": self.orient} if self.orient else {}
        return {**asdict(self.spec), "sensor_size": self.sensor_size, **oriented}

    def _read(self, path: Path) -> tuple[Events, tuple[int, int]]:
        """Events that can be counted, and the (height, width) of their sensor."""
        with open_events(path, warn=False) as recording:
            events = gather(recording)
            if recording.findings:
                self.repaired[path] = str(recording.findings)
        sensor_size = self.sensor_size or events.sensor_size
        if sensor_size is None:
            raise ValueError(f"sensor_size=(height, width) is needed: {path.name} does not state the camera's size")
        check_events(events, sensor_size, path)
        events, sensor_size = _oriented(events, sensor_size, self.orient)
        try:
            self.spec.frame_size(sensor_size)
        except ValueError as error:
            raise EventFileError(path, str(error)) from error
        return events, sensor_size

    def _count(self, path: Path) -> NDArray[np.unsignedinteger]:
        events, sensor_size = self._read(path)
        return events_to_frames(events, self.spec, sensor_size)

    def _usable(self, recordings: Sequence[tuple[Path, int]]) -> list[tuple[Path, int]]:
        fixed_size = self.spec.size or self.sensor_size

        def check(recording: tuple[Path, int]) -> EventFileError | tuple[int, ...]:
            path = recording[0]
            try:
                if self.cache is None:
                    return self.spec.frame_size(self._read(path)[1])
                if fixed_size and self.cache.has(path, self._parameters()):
                    return fixed_size  # made from a readable recording, and unchanged since
                return self.frames(path).shape[-2:]
            except EventFileError as error:
                return error

        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            checks = list(pool.map(check, recordings))
        pairs = zip(recordings, checks, strict=True)
        usable = [recording for recording, check in pairs if not isinstance(check, EventFileError)]
        self.skipped = {check.path: check.reason for check in checks if isinstance(check, EventFileError)}
        if self.repaired:
            told = f"{len(self.repaired)} of {len(recordings)} recordings were repaired: {_named(self.repaired)}"
            warnings.warn(told, EventFileWarning, stacklevel=4)
        if self.skipped:
            summary = f"{len(self.skipped)} of {len(recordings)} recordings cannot be used: {_named(self.skipped)}"
            if self.on_error == "raise":
                raise ValueError(f"{summary}. on_error='skip' leaves them out")
            if not usable:
                raise ValueError(summary)
            lost = {target for _, target in recordings} - {target for _, target in usable}
            without = f"; of {', '.join(self.class_names[i] for i in sorted(lost))} none is left" if lost else ""
            warnings.warn(f"{summary}. They are left out{without}", stacklevel=4)
        sizes = sorted({check for check in checks if not isinstance(check, EventFileError)})
        if len(sizes) > 1:
            raise ValueError(f"size=(height, width) is needed: the recordings' cameras have several sizes, {sizes}")
        _logger.info("%d recordings of %d classes", len(usable), len(self.class_names))
        return usable


def _oriented(events: Events, sensor_size: tuple[int, int], orient: str) -> tuple[Events, tuple[int, int]]:
    if orient == "transpose":
        return Events(events.t, events.y, events.x, events.p), (sensor_size[1], sensor_size[0])
    if orient == "rotate":
        height, width = sensor_size
        events = Events(events.t, width - 1 - events.x, height - 1 - events.y, events.p)
    return events, sensor_size


def _named(recordings: dict[Path, str]) -> str:
    names = [f"{path}: {reason}" for path, reason in list(recordings.items())[:_NAMED]]
    more = len(recordings) - len(names)
    return "; ".join(names) + (f"; and {more} more" if more else "")
