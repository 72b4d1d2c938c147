"""Learning curves as a picture."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..._files import replacing

__all__ = ["draw_curves"]


def draw_curves(history: Sequence[Mapping[str, Any]], path: Path, title: str) -> None:
    """Draw loss, accuracy, learning rate and firing rate by epoch. Lines differ in dash, so that grey is enough.

    Args:
        history: Rows of summary.csv.
        path: PNG file, replaced.
        title: Name of the run.

    Raises:
        ModuleNotFoundError: If matplotlib is not installed.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    panels = [
        ("loss", [("train_loss", "training", "--"), ("eval_loss", "validation", "-")]),
        ("accuracy, %", [("eval_top1", "top-1", "-"), ("eval_top5", "top-5", ":")]),
        ("learning rate", [("lr", "", "-")]),
        ("firing rate", [("firing_rate", "", "-")]),
    ]
    shown = [(label, lines) for label, lines in panels if any(_points(history, key)[0] for key, _, _ in lines)]
    figure, axes = plt.subplots(1, len(shown), figsize=(3.6 * len(shown), 3.2), layout="constrained", squeeze=False)
    for axis, (label, lines) in zip(axes[0], shown, strict=True):
        for key, name, dash in lines:
            epochs, values = _points(history, key)
            marker = "o" if len(epochs) < 25 else None
            axis.plot(epochs, values, dash, color="black", marker=marker, markersize=3, linewidth=1.2, label=name)
        axis.set_xlabel("epoch")
        axis.set_ylabel(label)
        axis.grid(color="0.85", linewidth=0.6)
        axis.xaxis.set_major_locator(plt.MaxNLocator(integer=True))
        if len(lines) > 1:
            axis.legend(frameon=False)
    figure.suptitle(title)
    with replacing(path) as file:
        figure.savefig(file, dpi=150, format="png")
    plt.close(figure)


def _points(history: Sequence[Mapping[str, Any]], key: str) -> tuple[list[int], list[float]]:
    rows = [(row["epoch"] + 1, row[key]) for row in history if row.get(key) is not None]
    return [epoch for epoch, _ in rows], [value for _, value in rows]
