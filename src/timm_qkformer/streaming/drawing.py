"""Pictures of anytime inference and of streams. Need matplotlib, as `analysis.drawing` does."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from .calibration import Calibration

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from .report import StreamReport

_STYLES = {"confidence": ("black", "-"), "margin": ("0.45", "--"), "entropy": ("0.65", ":")}
_NAMED = 8  # classes that get a line of their own


def _figure(height: float) -> tuple["Figure", Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.0, height), layout="constrained")
    return figure, figure.subplots()


def draw_calibration(calibration: Calibration, title: str = "") -> "Figure":
    """Accuracy against mean steps of every exit, the chosen threshold, and all samples for as many steps each."""
    figure, axis = _figure(4.2)
    found = calibration.reported_on
    for exit, points in calibration.curves.items():
        colour, line = _STYLES[exit]
        axis.plot([p.steps for p in points], [p.top1 for p in points], line, color=colour, label=f"stop on {exit}")
    steps = range(1, calibration.max_steps + 1)
    axis.plot(steps, found["top1_by_step"], "s", color="tab:blue", label="all samples for T steps")
    rule = calibration.rule
    chosen = f"chosen: {rule.exit} {rule.threshold:.4g}"
    axis.plot([found["steps"]], [found["top1"]], "o", color="tab:orange", markersize=9, label=chosen)
    axis.set_xlabel("mean number of time steps")
    axis.set_ylabel("top-1 (%)")
    axis.grid(color="0.9")
    axis.legend(fontsize=8)
    text = f"{found['samples']:,} samples, none of which the threshold was chosen on"
    axis.set_title("\n".join(part for part in (title.replace("$", r"\$"), text) if part), fontsize=10)
    return figure


def draw_stream(report: "StreamReport", title: str = "") -> "Figure":
    """Probabilities of the classes over the recording's own time, and the latency of each window."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.0, 5.0), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    seconds = [(row.end - report.rows[0].start) * 1e-6 for row in report.rows]
    p = np.asarray([row.probabilities for row in report.rows])
    for index in _largest(p):
        above.plot(seconds, p[:, index], label=report.name_of(index), linewidth=1.5)
    above.set_ylabel("probability")
    above.set_ylim(-0.02, 1.02)
    above.grid(color="0.9")
    above.legend(fontsize=8, ncols=4, loc="lower left", bbox_to_anchor=(0.0, 1.0), frameon=False)
    below.plot(seconds, [row.seconds * 1e3 for row in report.rows], ".", color="0.3", markersize=4)
    below.plot(seconds, [(row.end - row.start) * 1e-3 for row in report.rows], "-", color="tab:orange", linewidth=1)
    below.set_ylabel("latency (ms)\nline: window", fontsize=9)
    below.set_ylim(bottom=0)
    below.set_xlabel("time of the recording (s)")
    figure.suptitle(title.replace("$", r"\$"), fontsize=10)
    return figure


def _largest(p: "np.ndarray[Any, Any]") -> Sequence[int]:
    """The classes that come first at some time, or else come nearest to it."""
    order: list[int] = np.argsort(-p.max(0), kind="stable")[:_NAMED].tolist()
    return sorted(order)
