"""What a run tells while it goes, and what it leaves behind: lines, a progress bar, summary.csv, TensorBoard files."""

import csv
import importlib.util
import io
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Optional

from tqdm import tqdm

from ..._files import write_atomically
from .loop import Update

__all__ = ["Progress", "RunLog", "use_tensorboard", "write_summary"]


def use_tensorboard(wanted: Optional[bool]) -> bool:
    """Whether TensorBoard files are written: as asked for, else where it is installed.

    Raises:
        ValueError: If they are asked for and cannot be written.
    """
    there = importlib.util.find_spec("tensorboard") is not None
    if wanted and not there:
        raise ValueError("tensorboard is missing: pip install 'timm-qkformer[train]', or --no-tensorboard")
    return there if wanted is None else wanted


def write_summary(path: Path, history: Sequence[Mapping[str, Any]]) -> None:
    """Write all epochs so far as CSV; the file is replaced as a whole, so that it never holds half a line."""
    columns = list(dict.fromkeys(key for row in history for key in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows({key: "" if value is None else value for key, value in row.items()} for row in history)
    write_atomically(path, text.getvalue())


class RunLog:
    """Says things on one process, and nothing on the others.

    Args:
        primary: Whether this process speaks.
        tensorboard: Folder for TensorBoard files; None for none.
        purge_step: First update that TensorBoard is to forget from an earlier, interrupted part of the run.
    """

    def __init__(self, primary: bool, tensorboard: Optional[Path] = None, purge_step: int = 0) -> None:
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

    def scalars(self, values: Mapping[str, Optional[float]], step: int) -> None:
        """Add points to TensorBoard's curves."""
        if self._writer is not None:
            for name, value in values.items():
                if value is not None:
                    self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Bring everything to the disk."""
        if self._writer is not None:
            self._writer.close()


class Progress:
    """The progress bar of an epoch; where standard error is not a terminal, lines at intervals instead.

    Args:
        log: Where lines go.
        epoch: Number of the epoch.
        epochs: Number of epochs of the run.
        batches: Batches of the epoch.
        consumed: Batches done by an interrupted run.
        updates_left: Updates of the whole run from here on.
        interval: Updates between lines and points in TensorBoard.
        accumulation: Batches of an update.
        firing_rate: The last one measured.
    """

    def __init__(
        self,
        log: RunLog,
        epoch: int,
        epochs: int,
        batches: int,
        consumed: int,
        updates_left: int,
        interval: int,
        accumulation: int,
        firing_rate: Optional[float],
    ) -> None:
        self.log = log
        self.epoch = epoch
        self.batches = batches
        self.interval = interval
        self.accumulation = accumulation
        self.firing_rate = firing_rate
        self.samples = 0
        self.seconds = 0.0
        self._updates = 0
        self._updates_left = updates_left
        self._consumed = consumed
        self._start = time.perf_counter()
        self._quiet = not log.primary or not sys.stderr.isatty()
        self._bar = tqdm(
            total=batches,
            initial=consumed,
            desc=f"epoch {epoch + 1}/{epochs}",
            unit="batch",
            disable=self._quiet,
            leave=False,
        )

    def update(self, update: Update, mean_loss: float) -> None:
        """Show an update."""
        self.samples += update.samples
        self._updates += 1
        self.seconds = time.perf_counter() - self._start
        self._bar.update(update.consumed - self._consumed)
        self._consumed = update.consumed
        rate = "" if self.firing_rate is None else f"{self.firing_rate:.3f}"
        speed = self.samples_per_second
        left = _clock(self.seconds / self._updates * max(0, self._updates_left - self._updates))
        self._bar.set_postfix_str(
            f"{speed:.1f} images/s, loss {mean_loss:.4f}" + (f", firing rate {rate}" if rate else "") + f", {left} left"
        )
        last = update.consumed == self.batches
        # As train.py counts: the first update of an epoch, every interval-th after it, and the last.
        number = (update.consumed - 1) // self.accumulation
        if number % self.interval == 0 or last:
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
