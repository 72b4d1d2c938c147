"""What a run tells and leaves behind: lines, a progress bar, summary.csv, TensorBoard files, learning curves."""

import csv
import importlib.util
import io
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ...files import replacing, write_atomically
from ...progress import Bar, Pace
from .loop import Update


def use_tensorboard(wanted: bool | None) -> bool:
    """Whether to write TensorBoard files: as asked for (ValueError if they cannot be), else where it is installed."""
    there = importlib.util.find_spec("tensorboard") is not None
    if wanted and not there:
        raise ValueError("tensorboard is missing: pip install 'timm-qkformer[train]', or --no-tensorboard")
    return there if wanted is None else wanted


def write_summary(path: Path, history: Sequence[Mapping[str, Any]]) -> None:
    """Write all epochs so far as CSV; the file is replaced as a whole, so that it never holds half a line."""
    write_atomically(path, csv_text(history))


def csv_text(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows as CSV with a header; empty where a row has no value."""
    text = io.StringIO()
    columns = list(dict.fromkeys(key for row in rows for key in row))
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)  # None as an empty field
    return text.getvalue()


class RunLog:
    """Says things on one process (`primary`), and nothing on the others.

    `tensorboard` is the folder for TensorBoard files, `purge_step` the first update that it is to forget from an
    earlier, interrupted part of the run.
    """

    def __init__(self, primary: bool, tensorboard: Path | None = None, purge_step: int = 0) -> None:
        self.primary = primary
        self._writer = None
        if primary and tensorboard is not None:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(tensorboard), purge_step=purge_step)

    def say(self, text: str) -> None:
        """Print a line, above a progress bar if there is one."""
        if self.primary:
            tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()

    def scalars(self, values: Mapping[str, float | None], step: int) -> None:
        """Add points to TensorBoard's curves."""
        if self._writer is not None:
            for name, value in values.items():
                if value is not None:
                    self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Bring everything to the disk."""
        if self._writer is not None:
            self._writer.close()


@dataclass
class Progress:
    """The progress bar of an epoch; where standard error is not a terminal, lines at intervals instead."""

    log: RunLog
    epoch: int
    epochs: int
    batches: int  # of the epoch
    consumed: int  # batches done so far, also by an interrupted run
    updates_left: int  # of the whole run
    interval: int  # updates between lines and points in TensorBoard
    accumulation: int  # batches of an update
    firing_rate: float | None  # the last one measured
    pace: Pace  # of an update, whichever epoch it is of
    samples: int = 0
    seconds: float = 0.0

    def __post_init__(self) -> None:
        self._updates = 0
        self._start = time.perf_counter()
        self._quiet = not self.log.primary or not sys.stderr.isatty()
        title = f"epoch {self.epoch + 1}/{self.epochs}"
        self._bar = Bar(
            total=self.batches, initial=self.consumed, desc=title, unit="batch", disable=self._quiet, leave=False
        )

    def update(self, update: Update, mean_loss: float) -> None:
        """Show an update."""
        self.samples += update.samples
        self._updates += 1
        self.pace.step()
        self.seconds = time.perf_counter() - self._start
        self._bar.update(update.consumed - self.consumed)
        self.consumed = update.consumed
        rate = "" if self.firing_rate is None else f", firing rate {self.firing_rate:.3f}"
        speed = self.samples_per_second
        usual, remaining = self.pace.seconds, max(0, self.updates_left - self._updates)
        left = "?" if usual is None and remaining else _clock((usual or 0.0) * remaining)
        self._bar.set_postfix_str(f"{speed:.1f} images/s, loss {mean_loss:.4f}{rate}, {left} left")
        # As train.py counts: the first update of an epoch, every interval-th after it, and the last.
        number = (update.consumed - 1) // self.accumulation
        if number % self.interval == 0 or update.consumed == self.batches:
            self.log.scalars({"train/loss": update.loss, "train/lr": update.lr, "train/images_per_second": speed},
                             update.updates)  # fmt: skip
            if self._quiet:
                self.log.say(
                    f"epoch {self.epoch} [{update.consumed}/{self.batches}] loss {update.loss:.6g} "
                    f"({mean_loss:.6g})  lr {update.lr:.3e}  {speed:.1f} images/s  {left} left"
                )

    @property
    def samples_per_second(self) -> float:
        """Training samples of all processes, since this process began the epoch."""
        return self.samples / self.seconds if self.seconds else 0.0

    def close(self) -> None:
        """Take the bar away."""
        self._bar.close()


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"


def epoch_line(row: Mapping[str, Any], epochs: int) -> str:
    """An epoch's row of summary.csv as a line of the log."""
    parts = [f"epoch {row['epoch']} of {epochs}: loss {row['train_loss']:.4f}"]
    if "eval_loss" in row:
        parts.append(f"validation loss {row['eval_loss']:.4f}, top-1 {row['eval_top1']:.2f} %, "
                     f"top-5 {row['eval_top5']:.2f} %")  # fmt: skip
    if row["firing_rate"] is not None:
        parts.append(f"firing rate {row['firing_rate']:.4f}")
    parts.append(f"{row['images_per_second']:.1f} images/s")
    return ", ".join(parts)


def draw_curves(history: Sequence[Mapping[str, Any]], path: Path, title: str) -> None:
    """Draw loss, accuracy, learning rate and firing rate by epoch, from rows of summary.csv, to a PNG file, replaced.

    Lines differ in dash, so that grey is enough. ModuleNotFoundError if matplotlib is not installed.
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
