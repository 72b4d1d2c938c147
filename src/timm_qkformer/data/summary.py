"""What a recording holds, counted in one pass and in constant memory."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .events import Events
from .formats import open_events

_BINS = 128  # of the rate over time, at most
_MOST_PIXELS = 2**26
_HOT = 10  # times as many events as a pixel that fires has on average
_LEAST_HOT = 20  # events
_LISTED = 5  # hot pixels
_BARS = "▁▂▃▄▅▆▇█"


@dataclass
class Summary:
    """A recording in numbers. Times are in microseconds, rates in events per second."""

    path: Path
    format: str
    size_bytes: int
    sensor_size: tuple[int, int] | None  # (height, width) if it is stated
    seen_size: tuple[int, int]  # what the events reach, (height, width)
    events: int
    first: int
    last: int
    on: int  # events
    active_pixels: int
    hot_pixels: int
    hottest: list[tuple[int, int, int]]  # (x, y, events)
    rate_step: int  # microseconds of a bin of `counts`
    counts: list[int]  # events over time
    repairs: list[str]
    notes: list[str]
    details: dict[str, str]
    pixels: NDArray[np.int64] | None = field(default=None, repr=False)  # [2, H, W]

    @property
    def duration(self) -> int:
        """Microseconds from the first to the last time."""
        return self.last - self.first

    def to_dict(self) -> dict[str, Any]:
        """Without the picture of pixels."""
        data = asdict(self) | {"path": str(self.path), "duration": self.duration}
        del data["pixels"]
        return data


class _Rate:
    """Events over time in up to so many bins, of a recording whose length shows only at its end: bins double."""

    def __init__(self) -> None:
        self.step = 1
        self.start: int | None = None
        self.counts = np.zeros(_BINS, np.int64)

    def add(self, t: NDArray[np.integer[Any]]) -> None:
        if self.start is None:
            self.start = int(t.min())
        since = np.maximum(t.astype(np.int64) - self.start, 0)  # time may run back to before the beginning
        while int(since.max()) // self.step >= _BINS:
            self._double()
        self.counts += np.bincount(since // self.step, minlength=_BINS)

    def _double(self) -> None:
        halved = self.counts.reshape(-1, 2).sum(1)
        self.counts = np.concatenate((halved, np.zeros_like(halved)))
        self.step *= 2


def summarize(path: str | Path, progress: Callable[[int, int], None] | None = None) -> Summary:
    """Read a recording, and count what it holds.

    Args:
        path: A file of any format of `open_events`.
        progress: Called with bytes read and bytes in all.

    Raises:
        EventFileError: If it cannot be read.
    """
    rate = _Rate()
    total = on = 0
    first, last = 2**63 - 1, -(2**63)
    seen = (0, 0)
    with open_events(path, warn=False) as recording:
        pixels = _Pixels(recording.sensor_size)
        for chunk in recording:
            total += len(chunk)
            on += int(np.count_nonzero(chunk.p))
            first, last = min(first, int(chunk.t.min())), max(last, int(chunk.t.max()))
            seen = (max(seen[0], int(chunk.y.max()) + 1), max(seen[1], int(chunk.x.max()) + 1))
            rate.add(chunk.t)
            pixels.add(chunk)
            if progress is not None:
                progress(recording.progress, recording.size)
    counts = pixels.counts
    each = None if counts is None else counts.sum(0)
    hot = np.zeros(0, np.int64)
    if each is not None and each.any():
        limit = max(_HOT * each[each > 0].mean(), _LEAST_HOT)
        hot = np.flatnonzero(each > limit)
        hot = hot[np.argsort(each.reshape(-1)[hot])[::-1]]
    width = each.shape[1] if each is not None else 1
    used = int(np.flatnonzero(rate.counts)[-1]) + 1
    return Summary(
        path=Path(path),
        format=recording.format,
        size_bytes=recording.size,
        sensor_size=recording.sensor_size,
        seen_size=seen,
        events=total,
        first=first,
        last=last,
        on=on,
        active_pixels=0 if each is None else int(np.count_nonzero(each)),
        hot_pixels=len(hot),
        hottest=[(int(i % width), int(i // width), int(each.reshape(-1)[i])) for i in hot[:_LISTED]]
        if each is not None
        else [],
        rate_step=rate.step,
        counts=rate.counts[:used].tolist(),
        repairs=recording.findings.repairs,
        notes=recording.findings.notes,
        details=recording.details,
        pixels=counts,
    )


class _Pixels:
    """Counts [2, H, W]; grows where the sensor's size is not stated, and is given up for absurd sizes."""

    def __init__(self, size: tuple[int, int] | None) -> None:
        self.counts: NDArray[np.int64] | None = np.zeros((2, *(size or (0, 0))), np.int64)

    def add(self, chunk: Events) -> None:
        if self.counts is None:
            return
        _, height, width = self.counts.shape
        needed = (max(height, int(chunk.y.max()) + 1), max(width, int(chunk.x.max()) + 1))
        if needed[0] * needed[1] > _MOST_PIXELS:
            self.counts = None
            return
        if needed != (height, width):
            grown = np.zeros((2, *needed), np.int64)
            grown[:, :height, :width] = self.counts
            self.counts, (height, width) = grown, needed
        place = (chunk.p.astype(np.int64) * height + chunk.y) * width + chunk.x
        self.counts += np.bincount(place, minlength=2 * height * width).reshape(2, height, width)


def text_summary(summary: Summary) -> str:
    """The summary for people, lines of up to about 100 characters."""
    stated = summary.sensor_size
    size = "{} x {}" if stated else "not stated; events reach {} x {}"
    seconds = max(summary.duration, 1) / 1e6
    peak = max(summary.counts) / (summary.rate_step / 1e6)
    lines = [
        f"{summary.path}",
        f"  format      {summary.format}, {summary.size_bytes:,} bytes"
        + "".join(f", {key} {value}" for key, value in summary.details.items()),
        f"  sensor      {size.format(*(stated or summary.seen_size))} (height x width), "
        f"{summary.active_pixels:,} pixels fired",
        f"  events      {summary.events:,}, {100 * summary.on / summary.events:.1f} % on",
        f"  time        {summary.duration / 1e6:.6g} s, from {summary.first} to {summary.last} microseconds",
        f"  rate        {_unit(summary.events / seconds)} on average, {_unit(peak)} at most "
        f"(in {summary.rate_step / 1e3:g} ms)",
        f"              {sparkline(summary.counts)}",
    ]
    if summary.hot_pixels:
        listed = ", ".join(f"({x}, {y}) {count:,}" for x, y, count in summary.hottest)
        lines.append(
            f"  hot pixels  {summary.hot_pixels:,} with more than {_HOT} times the mean; (x, y) events: {listed}"
        )
    else:
        lines.append("  hot pixels  none")
    lines += [f"  repaired    {text}" for text in summary.repairs]
    lines += [f"  note        {text}" for text in summary.notes]
    return "\n".join(lines)


def sparkline(counts: list[int], width: int = 64) -> str:
    """Counts as a line of bars."""
    parts = np.array_split(np.asarray(counts, float), min(width, len(counts)))
    heights = np.array([part.mean() for part in parts])
    top = heights.max() or 1.0
    return "".join(_BARS[min(int(h / top * len(_BARS)), len(_BARS) - 1)] if h else " " for h in heights)


def _unit(rate: float) -> str:
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if rate >= limit:
            return f"{rate / limit:.3g} {unit}events/s"
    return f"{rate:.3g} events/s"
