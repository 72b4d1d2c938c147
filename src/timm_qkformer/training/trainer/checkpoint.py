"""Checkpoints of runs: saved whole or not at all, found, and resumed from."""

import argparse
import os
import shutil
import tempfile
import warnings
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from timm.models import clean_state_dict
from timm.utils import CheckpointSaver
from torch import Tensor, nn

from ...errors import first_line
from ...hub.checkpoints import CheckpointError, read_content
from .contents import check_contents
from .network import describe_misfit
from .settings import Settings, current_names

FORMAT = 3  # of the "trainer" entry
# Of a parameter group, what the command line sets and no optimizer changes. A schedule sets the learning rate.
_SETTINGS = ("weight_decay", "momentum", "betas", "eps", "lr_scale", "amsgrad", "maximize", "nesterov", "dampening",
             "foreach", "fused", "capturable", "differentiable")  # fmt: skip
_RATES = ("lr", "initial_lr")
# Kinds of its values that stand for each other.
_KINDS: dict[type, tuple[type, ...]] = {
    int: (int, float),
    float: (int, float),
    list: (list, tuple),
    tuple: (list, tuple),
}
# Of an optimizer's state, what has the shape of its parameter.
_MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer", "square_avg")


class DivergedError(ValueError):
    """Training gave numbers that are not finite."""


class RunSaver(CheckpointSaver):
    """timm's CheckpointSaver with checkpoints that survive a crash, a full disk and weights that are not finite.

    The files have timm's names and entries (`state_dict`, `state_dict_ema`, `arch`, `epoch`, `optimizer`, ...), so
    that timm's `load_checkpoint` and `--initial-checkpoint` take them. Settings are a plain dict in them; the entry
    "trainer" holds what else is needed to resume exactly. torch.load(weights_only=True) reads them without exceptions.
    A file is written under a name of its own and flushed to the disk before it is renamed.
    """

    trainer_state: dict[str, Any]
    _written = ""  # the file that the next renaming is of

    def _save(self, save_path: str, epoch: int, metric: float | None = None) -> None:
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
        self._written = ""
        try:
            # Not timm's name, which is the same in every process.
            handle, self._written = tempfile.mkstemp(dir=Path(save_path).parent, prefix=".checkpoint.", suffix=".tmp")
            with os.fdopen(handle, "wb") as file:
                torch.save(state, file)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(self._written, 0o644)  # mkstemp's are private
        except (OSError, RuntimeError) as error:
            if self._written:
                Path(self._written).unlink(missing_ok=True)
            raise OSError(
                f"a checkpoint in {Path(save_path).parent} could not be written ({_reason(error)}); those before it "
                f"are intact, --resume auto resumes the newest"
            ) from error

    def _replace(self, src: str, dst: str) -> None:
        """Give what `_save` wrote, timm says as `src`, its name."""
        _rename(self._written, dst)

    def _duplicate(self, src: str, dst: str) -> None:
        temporary = f"{dst}.new"
        Path(temporary).unlink(missing_ok=True)
        try:
            try:
                os.link(src, temporary)
            except OSError:  # file systems without links
                shutil.copy2(src, temporary)
            _rename(temporary, dst)
        except OSError as error:
            Path(temporary).unlink(missing_ok=True)
            raise OSError(f"the checkpoint {dst} could not be written ({_reason(error)}); {src} is complete") from error

    def restore(self, state: Mapping[str, Any], path: Path) -> None:
        """Continue from a checkpoint's entry "saver"; what a kill kept from being written after `path` is written.

        After last.pth.tar come checkpoint-N, if it is among the best, and model_best, which are copies.
        """
        self.load_state_dict(dict(state))
        epoch, metric = state.get("pending") or (None, None)
        if epoch is not None and path.name == f"last{self.extension}":
            ranked = self._checkpoint_path(epoch)
            is_known = ranked in [file for file, _ in self.checkpoint_files]
            worst = self.checkpoint_files[-1][1] if self.checkpoint_files else None
            has_room = len(self.checkpoint_files) < self.max_history
            if not is_known and (has_room or worst is None or (metric is not None and self.cmp(metric, worst))):
                if not has_room:
                    self._cleanup_checkpoints(1)
                self._duplicate(str(path), ranked)
                self._track_checkpoint(ranked, epoch, metric)
        best = Path(self.checkpoint_dir) / f"model_best{self.extension}"
        source = "" if self.best_epoch is None else self._checkpoint_path(self.best_epoch)
        if os.path.exists(source) and not (best.exists() and best.samefile(source)):
            self._duplicate(source, str(best))

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


def _rename(src: str, dst: str) -> None:
    os.replace(src, dst)
    _flush_folder(dst)


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


def newest_checkpoint(folder: Path, without: Collection[Path] = ()) -> Path | None:
    """The checkpoint of a run's folder that is furthest; one that cannot be read is passed over with a warning.

    So are those in `without`. Those of the best epochs are looked at only where no newer one can be read. ValueError if
    all are unreadable.
    """
    newest = [path for path in [folder / "last.pth.tar", *recovery_checkpoints(folder)] if path.is_file()]
    ranked = sorted(folder.glob("checkpoint-*.pth.tar"))
    there = newest + ranked
    newest, ranked = ([path for path in paths if path not in without] for paths in (newest, ranked))
    found = _furthest(newest) or _furthest(ranked)
    if found is None and there:
        raise ValueError(f"{folder} has checkpoints, but none that can be read")
    return found


def _furthest(candidates: list[Path]) -> Path | None:
    best: tuple[tuple[int, int], Path] | None = None
    for path in candidates:
        try:
            content = read_run(path, mmap=True)
        except CheckpointError as error:
            warnings.warn(f"passed over: {error}", stacklevel=2)
            continue
        trainer = content.get("trainer")
        progress = (trainer["epoch"], trainer["consumed"]) if trainer else (int(content.get("epoch", -1)) + 1, 0)
        if best is None or progress > best[0]:
            best = progress, path
    return best[1] if best else None


def read_run(path: Path, mmap: bool = False) -> dict[str, Any]:
    """Read a checkpoint of this trainer or of timm's train.py. See `read_content` for `mmap`.

    CheckpointError if it is not there, damaged, holds what could run code, or is no training checkpoint.
    """
    content = read_content(path, mmap)
    if not isinstance(content, dict) or "state_dict" not in content:
        raise CheckpointError(
            f"{path}: not a checkpoint of a training run; --initial-checkpoint starts from weights alone"
        )
    trainer = content.get("trainer")
    if isinstance(trainer, Mapping) and trainer.get("format") != FORMAT:
        raise CheckpointError(f"{path}: it has format {trainer.get('format')}, this version reads {FORMAT}")
    try:
        check_contents(content)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None
    return content


def settings_in(content: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of the run that wrote a checkpoint, under the names that they have now."""
    args = content.get("args")
    if isinstance(args, argparse.Namespace):
        args = vars(args)
    return current_names(args if isinstance(args, Mapping) else {})


def check_same_model(content: Mapping[str, Any], path: Path, model: nn.Module, name: str) -> None:
    """Refuse a checkpoint of another model than this one, which is not wrapped; ValueError naming both."""
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


def check_optimizer(content: Mapping[str, Any], path: Path, settings: Settings) -> None:
    """Refuse a checkpoint with another or no optimizer's state (ValueError), unless only its weights are wanted."""
    if settings.no_resume_opt:
        return
    if "optimizer" not in content:
        raise ValueError(
            f"checkpoint {path} has no state of an optimizer; --initial-checkpoint starts from its weights, "
            f"--no-resume-opt continues with a new optimizer"
        )
    opt = settings_in(content).get("opt", settings.opt)
    if opt.lower() != settings.opt.lower():
        raise ValueError(
            f"checkpoint {path} has the state of the optimizer {opt}, this run's opt is {settings.opt}; "
            f"--no-resume-opt continues with a new one"
        )


def resume_optimizer(
    optimizer: torch.optim.Optimizer, content: Mapping[str, Any], path: Path, settings: Settings, follows: bool
) -> None:
    """Load an optimizer's state; what is set on the command line stays as it is in `optimizer`, which is new.

    With a schedule that `follows` the metric the learning rate is part of the state. ValueError for other parameters.
    """
    names = {*_SETTINGS, *settings.opt_kwargs, *(() if follows else _RATES)}
    new = [dict(group) for group in optimizer.param_groups]
    own = [{name: group[name] for name in names & group.keys()} for group in new]
    try:
        optimizer.load_state_dict(content["optimizer"])
    except (KeyError, ValueError) as error:
        raise ValueError(
            f"checkpoint {path}: the optimizer's state is of other parameters ({error}); "
            f"--no-resume-opt continues with a new optimizer"
        ) from error
    except (AttributeError, LookupError, RuntimeError, TypeError) as error:
        raise CheckpointError(f"{path}: its optimizer's state cannot be loaded ({first_line(error)})") from error
    _check_state(optimizer, path)
    _check_groups(optimizer, new, path)
    for group, kept in zip(optimizer.param_groups, own, strict=True):
        group.update(kept)


def _kind(p: Tensor, state: Mapping[str, Any]) -> tuple[int, bool | None]:
    """What parameters whose states have the same names have in common.

    Factored moments of matrices have other names than those of vectors; timm's Muon leaves vectors and convolutions of
    few inputs to AdamW, and says so.
    """
    return p.ndim, state.get("use_muon")


def _check_state(optimizer: torch.optim.Optimizer, path: Path) -> None:
    """Refuse a state that PyTorch takes and the first update would stumble over (CheckpointError)."""
    states = [(p, optimizer.state[p]) for group in optimizer.param_groups for p in group["params"]]
    states = [(p, state) for p, state in states if state]
    names: dict[tuple[int, bool | None], Counter[frozenset[str]]] = {}
    for p, state in states:
        names.setdefault(_kind(p, state), Counter())[frozenset(state)] += 1
    kinds: dict[str, Counter[type]] = {}
    for _, state in states:
        for name, value in state.items():
            kinds.setdefault(name, Counter())[type(value)] += 1
    for p, state in states:
        where = f"{path}: its optimizer's state of a parameter {list(p.shape)}"
        if lacking := sorted(map(str, names[_kind(p, state)].most_common(1)[0][0] - state.keys())):
            raise CheckpointError(f"{where} lacks {', '.join(lacking)}")
        for name, value in state.items():
            if type(value) is not kinds[name].most_common(1)[0][0]:
                raise CheckpointError(f"{where} has {name} of type {type(value).__name__}")
            wanted = p.shape if name in _MOMENTS else torch.Size([])
            if isinstance(value, Tensor) and name in (*_MOMENTS, "step") and value.shape != wanted:
                raise CheckpointError(f"{where} has {name} of shape {list(value.shape)}")


def _check_groups(optimizer: torch.optim.Optimizer, own: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Refuse options of another kind than a new optimizer's (CheckpointError)."""
    for number, (group, new) in enumerate(zip(optimizer.param_groups, own, strict=True)):
        for name, value in new.items():
            loaded, kinds = group.get(name), _KINDS.get(type(value), type(value))
            if name != "params" and value is not None and not isinstance(loaded, kinds):
                raise CheckpointError(f"{path}: its optimizer's group {number} has {name} of {type(loaded).__name__}")


def schedule_state(scheduler: Any) -> dict[str, Any] | None:
    """What a schedule (or None) has to remember: nothing, but for `plateau`, which follows the metric."""
    plateau = getattr(scheduler, "lr_scheduler", None)
    if plateau is None:
        return None
    return {
        "timm": scheduler.state_dict(),
        "num_bad_epochs": plateau.num_bad_epochs,
        "cooldown_counter": plateau.cooldown_counter,
        "restore_lr": scheduler.restore_lr,
    }


def resume_schedule(scheduler: Any, state: Mapping[str, Any] | None, epoch: int, updates: int) -> None:
    """Set the learning rate where a run starts or resumes.

    Args:
        scheduler: timm's, new, or None for a learning rate that stays; on an optimizer whose state has been loaded.
        state: What `schedule_state` gave; None if it is not known.
        epoch: The epoch that is resumed or comes next.
        updates: Updates that have been done.
    """
    if scheduler is None:
        return
    plateau = getattr(scheduler, "lr_scheduler", None)
    if plateau is not None:
        if state is not None:
            scheduler.load_state_dict(state["timm"])
            plateau.num_bad_epochs = state["num_bad_epochs"]
            plateau.cooldown_counter = state["cooldown_counter"]
            scheduler.restore_lr = state["restore_lr"]
    elif scheduler.t_in_epochs:
        # In epoch 0 the rate is the optimizer's own, which the schedule's formula may miss by a rounding.
        if epoch > 0:
            scheduler.step(epoch)
    elif updates > 0:
        scheduler.step_update(updates)
