"""A cache of frames, so that a recording is counted once."""

import hashlib
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..files import replacing
from .arrays import load_arrays

_FORMAT = 1  # part of every key: raise it whenever the meaning of the stored frames changes

Frames = NDArray[np.unsignedinteger[Any]]


class FrameCache:
    """A folder of frames, one file for each recording and set of parameters.

    A file is written under a temporary name and renamed, so a reader finds a whole file or none, whichever process
    wrote it and however it ended. The key holds the recording's path, modification time and size: a changed recording
    is counted again. A file that does not read back, of which the archive's checksums are the judge, is rebuilt with a
    warning. A disk that is full costs a warning and the speed, not the run.
    """

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)
        try:
            self.root.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OSError(f"cache_dir={str(self.root)!r} cannot be created: {error}") from error

    def path(self, source: Path, parameters: dict[str, object]) -> Path:
        """Where the frames of a recording are or will be.

        Raises:
            OSError: If the recording cannot be looked up.
        """
        stat = source.stat()
        key = [_FORMAT, str(source.resolve()), stat.st_mtime_ns, stat.st_size, parameters]
        digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
        return self.root / digest[:2] / f"{source.stem}-{digest[2:26]}.npz"

    def has(self, source: Path, parameters: dict[str, object]) -> bool:
        """Whether the frames of a recording, as it is now, have been stored."""
        try:
            return self.path(source, parameters).exists()
        except OSError:
            return False

    def get(self, source: Path, parameters: dict[str, object], build: Callable[[], Frames]) -> Frames:
        """Return the frames [T, 2, H, W] of a recording, from disk or from `build`, which are then stored."""
        path = self.path(source, parameters)
        if path.exists():
            try:
                return _load(path)
            except (OSError, ValueError) as error:
                warnings.warn(f"cache file {path} is corrupt and is rebuilt from {source} ({error})", stacklevel=2)
        frames = build()
        try:
            _save(path, frames)
        except OSError as error:
            # Without the file's name: the same text every time is shown once.
            warnings.warn(
                f"cannot write to the cache {self.root}, continuing without it: {error.strerror}", stacklevel=2
            )
        return frames


def _load(path: Path) -> Frames:
    frames = load_arrays(path, ("frames",))["frames"]
    if frames.ndim != 4 or frames.dtype.kind != "u":
        raise ValueError(f"expected counts [T, 2, H, W], found {frames.dtype} {frames.shape}")
    return frames


def _save(path: Path, frames: Frames) -> None:
    smallest = np.min_scalar_type(int(frames.max(initial=0)))  # mostly uint8
    path.parent.mkdir(exist_ok=True)
    with replacing(path) as file:
        np.savez_compressed(file, frames=frames.astype(smallest))
