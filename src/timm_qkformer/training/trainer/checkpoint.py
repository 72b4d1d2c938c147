"""Checkpoints: whole or not there, and without anything that could run when they are read."""

import argparse
import math
import os
import pickle
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Optional

import torch
from timm.models import clean_state_dict
from timm.utils import CheckpointSaver
from torch import Tensor, nn

from ..._errors import first_line
from .network import describe_misfit

__all__ = [
    "DivergedError",
    "RunSaver",
    "check_same_model",
    "newest_checkpoint",
    "plain_settings",
    "read_checkpoint",
    "settings_in",
]

FORMAT = 3  # of the "trainer" entry


class DivergedError(ValueError):
    """Training gave numbers that are not finite."""


class RunSaver(CheckpointSaver):
    """timm's CheckpointSaver with checkpoints that survive a crash, a full disk and weights that are not finite.

    The files have timm's names and entries (`state_dict`, `state_dict_ema`, `arch`, `epoch`, `optimizer`, ...), so
    that timm's `load_checkpoint` and `--initial-checkpoint` take them. Settings are a plain dict in them; the entry
    "trainer" holds what else is needed to go on exactly. torch.load(weights_only=True) reads them without exceptions.

    A file is written under another name and flushed to the disk before it takes its place.

    Attributes:
        trainer_state: The next checkpoint's entry "trainer".
    """

    trainer_state: dict[str, Any]

    def _save(self, save_path: str, epoch: int, metric: Optional[float] = None) -> None:
        state: dict[str, Any] = {"epoch": epoch, "arch": self.args["model"], "args": self.args, "version": 2}
        state["optimizer"] = self.optimizer.state_dict()
        if self.amp_scaler is not None:
            state[self.amp_scaler.state_dict_key] = self.amp_scaler.state_dict()
        state.update(self.task.get_checkpoint_state())
        state.update(self.task.get_checkpoint_state(ema=True))
        if metric is not None:
            state["metric"] = metric
        # Without a metric it is a checkpoint within an epoch, which is not part of the ranked ones.
        state["saver"] = self.state_dict(epoch if metric is not None else None, metric)
        state["trainer"] = {"format": FORMAT, **_without_bytes(self.trainer_state)}
        _require_finite(state["state_dict"])
        try:
            with open(save_path, "wb") as file:
                torch.save(state, file)
                file.flush()
                os.fsync(file.fileno())
        except (OSError, RuntimeError) as error:
            Path(save_path).unlink(missing_ok=True)
            raise OSError(
                f"the checkpoint {save_path} could not be written ({_reason(error)}); those before it are intact, "
                f"--resume auto goes on from the newest"
            ) from error

    def _replace(self, src: str, dst: str) -> None:
        os.replace(src, dst)
        _flush_folder(dst)

    def _duplicate(self, src: str, dst: str) -> None:
        temporary = f"{dst}.new"
        Path(temporary).unlink(missing_ok=True)
        try:
            try:
                os.link(src, temporary)
            except OSError:  # file systems without links
                shutil.copy2(src, temporary)
            self._replace(temporary, dst)
        except OSError as error:
            Path(temporary).unlink(missing_ok=True)
            raise OSError(f"the checkpoint {dst} could not be written ({_reason(error)}); {src} is complete") from error

    def forget_recovery(self) -> None:
        """Delete the checkpoints within epochs, when that of a finished epoch is there."""
        for path in recovery_checkpoints(Path(self.recovery_dir)):
            path.unlink(missing_ok=True)
        self.curr_recovery_file = self.prev_recovery_file = ""


def _without_bytes(value: Any) -> Any:
    """The same with byte strings as tensors: a pickle calls a function for bytes, which strict readers refuse."""
    if isinstance(value, bytes):
        return torch.frombuffer(bytearray(value), dtype=torch.uint8)
    if isinstance(value, dict):
        return {key: _without_bytes(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_without_bytes(v) for v in value)
    return value


def _require_finite(weights: Mapping[str, Tensor]) -> None:
    bad = [name for name, w in weights.items() if w.is_floating_point() and not bool(w.isfinite().all())]
    if bad:
        raise DivergedError(f"{len(bad)} tensors of the model are not finite ({bad[0]}, ...)")


def _reason(error: BaseException) -> str:
    """The system's reason, also where torch's writer has put it behind its own."""
    while error is not None:
        if isinstance(error, OSError) and error.strerror:
            return error.strerror
        if error.__cause__ is None and error.__context__ is None:
            break
        error = error.__cause__ or error.__context__  # type: ignore[assignment]
    return first_line(error)


def _flush_folder(path: str) -> None:
    """Bring a renaming to the disk, where folders can be opened."""
    try:
        folder = os.open(os.path.dirname(path) or ".", os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(folder)
    except OSError:
        pass  # not every file system can
    finally:
        os.close(folder)


def recovery_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints within epochs."""
    return [path for path in sorted(folder.glob("recovery-*.pth.tar")) if path.is_file()]


def newest_checkpoint(folder: Path) -> Optional[Path]:
    """The checkpoint of a run's folder that is furthest; one that cannot be read is passed over with a warning.

    Those of the best epochs are looked at only where no newer one can be read.

    Raises:
        ValueError: If there are some, and none that can be read.
    """
    newest = [path for path in [folder / "last.pth.tar", *recovery_checkpoints(folder)] if path.is_file()]
    ranked = sorted(folder.glob("checkpoint-*.pth.tar"))
    found = _furthest(newest) or _furthest(ranked)
    if found is None and newest + ranked:
        raise ValueError(f"{folder} has checkpoints, but none that can be read")
    return found


def _furthest(candidates: list[Path]) -> Optional[Path]:
    best: tuple[tuple[int, int], Path] | None = None
    for path in candidates:
        try:
            content = read_checkpoint(path, mmap=True)
        except ValueError as error:
            warnings.warn(f"passed over: {error}", stacklevel=2)
            continue
        trainer = content.get("trainer")
        progress = (trainer["epoch"], trainer["consumed"]) if trainer else (int(content.get("epoch", -1)) + 1, 0)
        if best is None or progress > best[0]:
            best = progress, path
    return best[1] if best else None


def read_checkpoint(path: Path, mmap: bool = False) -> dict[str, Any]:
    """Read a checkpoint of this trainer or of timm's train.py.

    Args:
        path: The file.
        mmap: Leave the tensors on the disk until they are looked at.

    Raises:
        FileNotFoundError: If it is not there.
        ValueError: If it is damaged, holds what could run code, or is no training checkpoint.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no checkpoint {path}")
    try:
        # train.py's hold their settings as such an object, which is data only.
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except (RuntimeError, pickle.UnpicklingError, EOFError, OSError, ValueError, KeyError) as error:
        raise ValueError(f"checkpoint {path} cannot be read ({first_line(error)})") from error
    if not isinstance(content, dict) or "state_dict" not in content:
        raise ValueError(
            f"{path} is not a checkpoint of a training run; --initial-checkpoint starts from weights alone"
        )
    trainer = content.get("trainer")
    if trainer is not None and trainer.get("format") != FORMAT:
        raise ValueError(f"checkpoint {path} has format {trainer.get('format')}, this version reads {FORMAT}")
    return content


def settings_in(content: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of the run that wrote a checkpoint."""
    args = content.get("args")
    return dict(args if isinstance(args, Mapping) else vars(args) if args is not None else {})


def check_same_model(content: Mapping[str, Any], path: Path, model: nn.Module, name: str) -> None:
    """Refuse a checkpoint of another model.

    Args:
        content: The checkpoint.
        path: Where it is from.
        model: The model that is to go on, not wrapped.
        name: Its name.

    Raises:
        ValueError: If they differ, naming both.
    """
    arch = str(content.get("arch", ""))
    if arch and arch.partition(".")[0] != name.partition(".")[0]:
        raise ValueError(f"checkpoint {path} is of the model {arch}, this run trains {name}")
    facts = (content.get("trainer") or {}).get("model", {})
    for key, value in facts.items():
        own = getattr(model, key, value)
        if own != value:
            raise ValueError(f"checkpoint {path} is of {arch} with {key}={value}, this run's {name} has {key}={own}")
    misfit = describe_misfit(model, clean_state_dict(content["state_dict"]))
    if misfit:
        raise ValueError(f"checkpoint {path} of {arch or 'a model'} does not fit this run's {name}: {misfit}")


def plain_settings(args: argparse.Namespace) -> dict[str, Any]:
    """Settings as values that YAML and checkpoints hold without any class."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {str(k): plain(v) for k, v in value.items()}
        if isinstance(value, (list, tuple)):
            return [plain(v) for v in value]
        if isinstance(value, float) and not math.isfinite(value):
            return str(value)
        return value if isinstance(value, (bool, int, float, str)) or value is None else str(value)

    return {key: plain(value) for key, value in sorted(vars(args).items())}
