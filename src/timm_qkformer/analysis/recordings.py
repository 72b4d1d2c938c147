"""Pictures of recordings of events: what fired where and when, and a short film of it."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ..data.formats import open_events
from ..data.representations import represent
from ..data.summary import Summary
from ..data.windows import time_windows
from ..files import replacing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_FILM_SIDE = 320  # pixels of a film's longer side, at most
_MOST_FRAMES = 200
_ON, _OFF = (35, 90, 200), (215, 90, 40)  # told apart by people who do not tell red from green


def draw_recording(summary: Summary) -> "Figure":
    """The rate over time, where events happened, and how many events pixels have.

    Args:
        summary: Of a recording, with its pixels.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 6), layout="constrained")
    rate, map_, histogram = figure.subplot_mosaic(
        [["rate", "rate"], ["map", "histogram"]], width_ratios=[3, 2]
    ).values()
    figure.suptitle(f"{summary.path.name}: {summary.events:,} events in {summary.duration / 1e6:.4g} s")
    seconds = np.arange(len(summary.counts) + 1) * summary.rate_step / 1e6
    rate.stairs(np.asarray(summary.counts) / (summary.rate_step / 1e6), seconds, fill=True, color="0.3")
    rate.set(xlabel="time in s", ylabel="events/s", xlim=(0, seconds[-1]), title="rate")
    if summary.pixels is None:
        map_.set_axis_off()
        histogram.set_axis_off()
        return figure
    each = summary.pixels.sum(0)
    image = map_.imshow(np.log10(each + 1), cmap="gray", interpolation="nearest")
    figure.colorbar(image, ax=map_, label="log10(events + 1)")
    map_.set(title=f"pixels, {summary.hot_pixels:,} hot, the hottest marked", xlabel="x", ylabel="y")
    if summary.hottest:
        x, y, _ = zip(*summary.hottest, strict=True)
        map_.plot(x, y, "o", markerfacecolor="none", markeredgecolor="tab:orange", markersize=10)
    top = np.log10(max(int(each.max()), 1) + 1)
    for name, counts, color in (("off", summary.pixels[0], _OFF), ("on", summary.pixels[1], _ON)):
        fired = counts[counts > 0]
        label = f"{name}, {100 * counts.sum() / summary.events:.1f} %"
        heights, edges = np.histogram(np.log10(fired + 1), 30, (0, top))
        histogram.stairs(heights, edges, color=[c / 255 for c in color], label=label)
    histogram.set(xlabel="log10(events of a pixel + 1)", ylabel="pixels", title="polarities", yscale="log")
    histogram.legend()
    return figure


def write_film(path: Path, summary: Summary, target: Path, frames: int = 40, milliseconds: int = 50) -> None:
    """An animated GIF of the whole recording: blue where brightness rose, orange where it fell.

    Args:
        path: The recording, which is read again, in constant memory.
        summary: Of the recording.
        target: The file to write; it appears when it is complete.
        frames: How many, up to 200.
        milliseconds: That each is shown.
    """
    if not 1 <= frames <= _MOST_FRAMES:
        raise ValueError(f"frames={frames} needs to be 1 to {_MOST_FRAMES}")
    size = summary.sensor_size or summary.seen_size
    scale = min(1.0, _FILM_SIDE / max(size))
    small = (max(int(size[0] * scale), 1), max(int(size[1] * scale), 1))
    first, *others = (Image.fromarray(picture) for picture in _pictures(path, summary, frames, size, small))
    with replacing(target) as file:
        first.save(file, "GIF", save_all=True, append_images=others, duration=milliseconds, loop=0)


def _pictures(
    path: Path, summary: Summary, frames: int, size: tuple[int, int], small: tuple[int, int]
) -> Iterator[NDArray[np.uint8]]:
    duration = summary.duration // frames + 1
    with open_events(path, warn=False) as recording:
        for window in time_windows(recording, duration, summary.first, incomplete=True):
            off, on = represent(window.events, size, small)
            top = max(np.percentile(off + on, 99.5), 1)
            picture = np.full((*small, 3), 255.0)
            for counts, color in ((off, _OFF), (on, _ON)):
                strength = np.minimum(counts / top, 1)[..., None]
                picture += strength * (np.array(color) - 255.0)
            yield np.clip(picture, 0, 255).astype(np.uint8)
