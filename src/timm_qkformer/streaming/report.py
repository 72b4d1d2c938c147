"""What a stream was like: the running prediction, the latency of windows, and whether the model kept up."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from .stream import Prediction, delays

_LINES = 20  # of the text, beside those where the prediction changes
_LATE = 0.01  # share of windows that may be


@dataclass(frozen=True)
class Row:
    """A window and its answer, without the state."""

    start: int  # microseconds
    end: int
    events: int
    steps: int
    label: int
    probabilities: list[float]
    seconds: float


@dataclass(frozen=True)
class StreamReport:
    """All windows of a stream, one at least."""

    rows: list[Row]
    names: Sequence[str] = ()  # of the classes

    @classmethod
    def of(cls, predictions: Iterable[Prediction], names: Sequence[str] = ()) -> "StreamReport":
        """Read a stream to its end.

        Raises:
            ValueError: If it has no window.
        """
        rows = [
            Row(p.start, p.end, p.events, p.steps, p.label, p.probabilities.tolist(), p.seconds) for p in predictions
        ]
        if not rows:
            raise ValueError("the stream has no events, so there is no window")
        return cls(rows, names)

    def name_of(self, label: int) -> str:
        """A class's name, or its number."""
        return self.names[label] if label < len(self.names) else str(label)

    @property
    def milliseconds(self) -> tuple[float, float]:
        """Latency of a window: median and 99th percentile."""
        values = [1e3 * row.seconds for row in self.rows]
        return float(np.median(values)), float(np.percentile(values, 99))

    @property
    def late(self) -> int:
        """Windows whose answer came after the next one was complete, at the recording's own pace."""
        found = zip(delays(self.rows), self.rows[1:], strict=False)
        return sum(delay > (following.end - following.start) * 1e-6 for delay, following in found)

    @property
    def keeps_up(self) -> bool:
        """Whether at most one window in a hundred is late."""
        return self.late <= _LATE * len(self.rows)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        median, percentile = self.milliseconds
        return {
            "windows": len(self.rows),
            "median_ms": median,
            "percentile_99_ms": percentile,
            "late": self.late,
            "keeps_up": self.keeps_up,
            "label": self.rows[-1].label,
            "name": self.name_of(self.rows[-1].label),
            "rows": [asdict(row) for row in self.rows],
        }

    def text(self) -> str:
        """The running prediction, where it changes and at even distances, and what it took."""
        every = -(-len(self.rows) // _LINES)
        lines = [f"{'time':>10} {'events':>8}  {'prediction':<20} {'probability':>11} {'latency':>10}"]
        for i, row in enumerate(self.rows):
            changes = i == 0 or row.label != self.rows[i - 1].label
            if changes or i % every == 0 or i == len(self.rows) - 1:
                at = (row.end - self.rows[0].start) * 1e-6
                lines.append(
                    f"{at:>8.3f} s {row.events:>8,}  {self.name_of(row.label):<20} {max(row.probabilities):>11.3f} "
                    f"{1e3 * row.seconds:>7.2f} ms"
                )
        median, percentile = self.milliseconds
        widths = [(row.end - row.start) * 1e-3 for row in self.rows]
        verdict = "keeps up" if self.keeps_up else "does NOT keep up"
        lines.append(
            f"{len(self.rows):,} windows of {np.median(widths):.3g} ms (median): latency {median:.2f} ms (median), "
            f"{percentile:.2f} ms (99th percentile); {self.late:,} answers came after the next window: it {verdict}"
        )
        return "\n".join(lines)
