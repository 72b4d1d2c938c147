"""A run's folder: found or made, and locked so that no second run writes into it.

The lock is one of the operating system's on the file `.lock`, which is there while a run has the folder. The system
gives it back when the process ends, however that happens.
"""

import errno
import os
import socket
import warnings
from collections.abc import Callable
from datetime import datetime
from itertools import count
from pathlib import Path

from timm.models import safe_model_name

from .checkpoint import newest_checkpoint
from .settings import Settings

_LOCK = ".lock"
# What a process that was killed leaves behind: nobody else writes into a folder that is locked.
_UNFINISHED = (".*.tmp", "*.pth.tar.new", "tmp.pth.tar", "recovery_tmp.pth.tar")
_BEGUN = ("args.yaml", "events.out.tfevents.*", *_UNFINISHED)
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)

_held: set[int] = set()  # file descriptors


def _let_go() -> None:
    """In a forked process: a loader's worker that outlives the run must not keep its lock."""
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go)


class RunInUseError(OSError):
    """Another process writes into the folder."""


class FolderLock:
    """The lock of a folder, from here until `release` or the end of the process; RunInUseError if another has it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._path = folder / _LOCK
        while True:
            self._descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                _lock(self._descriptor)
                if self._is_current():
                    break
            except BaseException as error:
                holder = os.pread(self._descriptor, 200, 0).decode(errors="replace") if os.name != "nt" else ""
                os.close(self._descriptor)
                if not isinstance(error, (BlockingIOError, PermissionError)):
                    raise
                raise RunInUseError(
                    f"{folder} is in use by another run{f' ({holder})' if holder.isprintable() and holder else ''}; "
                    f"wait for its end, or choose another name with --experiment"
                ) from None
            os.close(self._descriptor)  # of a file that its holder deleted meanwhile
        _held.add(self._descriptor)
        os.ftruncate(self._descriptor, 0)
        os.write(self._descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode())

    def _is_current(self) -> bool:
        try:
            return os.path.samestat(os.fstat(self._descriptor), os.stat(self._path))
        except FileNotFoundError:
            return False

    def release(self) -> None:
        """Let others have the folder."""
        if self._descriptor in _held:
            _held.remove(self._descriptor)
            try:
                if os.name != "nt":  # which deletes no open files
                    self._path.unlink(missing_ok=True)
            finally:
                os.close(self._descriptor)


def _lock(descriptor: int) -> None:
    """Lock a file or raise BlockingIOError (PermissionError on Windows)."""
    take: Callable[[], None]
    if os.name == "nt":
        import msvcrt

        take = lambda: msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]  # noqa: E731
    else:
        import fcntl

        take = lambda: fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # noqa: E731
    try:
        take()
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        warnings.warn("this file system has no locks: see to it that no other run writes here", stacklevel=3)


class RunFolder:
    """The folder of a run, and the checkpoint in it to resume from. To be closed."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.runs = Path(settings.output or "output/train")
        self.resumed: Path | None = None  # the checkpoint that is being resumed from
        self.passed_over: set[Path] = set()  # those that turned out not to be usable
        self._lock: FolderLock | None = None

    def checkpoint(self) -> str | None:
        """The checkpoint that `resume` names, or finds where it is "auto"; None for a new run.

        ValueError if there are checkpoints and none can be read; RunInUseError if another run has the folder.
        """
        settings = self.settings
        if settings.resume != "auto":
            return settings.resume or None
        if settings.experiment:
            folders = [self.runs / settings.experiment]
        else:
            found = self.runs.glob("*/*.pth.tar")
            folders = sorted({path.parent for path in found}, key=lambda p: p.stat().st_mtime)[-1:]
        if not folders or not folders[0].is_dir():
            return None
        self._take(folders[0])
        newest = newest_checkpoint(folders[0], self.passed_over)
        return str(newest) if newest else None

    def choose(self, resume: str | None, size: int) -> Path:
        """The checkpoint's folder, if it is this run's, else a new one, which `begin` makes.

        FileExistsError if another run has it.
        """
        settings, runs = self.settings, self.runs
        own = settings.experiment and resume and Path(resume).parent.resolve() == (runs / settings.experiment).resolve()
        if resume and (settings.resume == "auto" or own):
            self._take(Path(resume).parent)
            return Path(resume).parent
        stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
        folder = runs / (settings.experiment or "-".join([stamp, safe_model_name(settings.model), str(size)]))
        if settings.experiment:
            self._refuse_taken(folder)
        return folder

    def begin(self, folder: Path) -> Path:
        """Make a new run's folder. A default name that is taken already, in the same second, gets a number."""
        for number in count(1):
            candidate = folder if number == 1 else folder.with_name(f"{folder.name}-{number}")
            try:
                candidate.mkdir(parents=True, exist_ok=bool(self.settings.experiment))
            except FileExistsError:
                if self.settings.experiment or not candidate.is_dir():
                    raise
                continue
            self._take(candidate)
            self._refuse_taken(candidate)  # another run may have come and gone
            self.tidy(candidate)
            return candidate
        raise AssertionError("unreachable")

    def tidy(self, folder: Path) -> None:
        """Delete what a killed process could not finish."""
        for pattern in _UNFINISHED:
            for path in folder.glob(pattern):
                path.unlink(missing_ok=True)

    def close(self) -> None:
        """Let other runs have the folder."""
        if self._lock is not None:
            self._lock.release()

    def _take(self, folder: Path) -> None:
        if self._lock is None or self._lock.folder.resolve() != folder.resolve():
            self.close()
            self._lock = FolderLock(folder)

    def _refuse_taken(self, folder: Path) -> None:
        files = [path for path in folder.iterdir() if path.name != _LOCK] if folder.exists() else []
        begun = all(any(path.match(pattern) for pattern in _BEGUN) for path in files)
        if files and not (self.settings.resume == "auto" and begun):
            raise FileExistsError(f"{folder} holds a run already; --resume auto resumes it, or choose another name")
