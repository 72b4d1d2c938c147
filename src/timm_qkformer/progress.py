"""Progress bars whose estimates are not led astray by a step in which a kernel compiles."""

import statistics
import time
from collections import deque
from typing import Any

from tqdm import tqdm

_STEPS = 32  # the estimate is the median of so many
_FEWEST = 3  # below, nothing is estimated: one of two slow steps may have compiled something


class Pace:
    """How long a usual step takes: the median of the last ones.

    The first step counts from the first call on, so that what comes before (workers that start, a first batch) is left
    out. A mean would announce ten minutes after a step in which a kernel compiled.
    """

    def __init__(self) -> None:
        self._seconds: deque[float] = deque(maxlen=_STEPS)
        self._last: float | None = None

    def step(self, count: float = 1) -> None:
        """`count` steps have been done since the last call."""
        now = time.perf_counter()
        if self._last is not None and count > 0:
            self._seconds.append((now - self._last) / count)
        self._last = now

    @property
    def seconds(self) -> float | None:
        """Seconds of a step; None until enough of them are known."""
        return statistics.median(self._seconds) if len(self._seconds) >= _FEWEST else None


class Bar(tqdm):
    """tqdm's bar with `Pace`'s estimate: "?" at first, and at the end the mean over everything."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._pace = Pace()  # the constructor draws the bar
        super().__init__(*args, **kwargs)

    def update(self, n: float | None = 1) -> bool | None:
        """Add n steps."""
        self._pace.step(n or 0)
        drawn: bool | None = super().update(n)
        return drawn

    @property
    def format_dict(self) -> dict[str, Any]:
        """What the bar is drawn from."""
        values: dict[str, Any] = super().format_dict
        if values["total"] is None or values["n"] < values["total"]:
            seconds = self._pace.seconds
            values["rate"] = 1 / seconds if seconds else 0  # 0 is drawn as "?", None as a mean
        return values
