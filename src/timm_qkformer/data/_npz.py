"""Read .npz files that may be anything."""

import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray


def load_arrays(path: Path, names: Sequence[str]) -> dict[str, NDArray[Any]]:
    """Load arrays of an .npz file, never unpickling.

    Raises:
        ValueError: If the file is not a sound .npz archive with these arrays.
        OSError: If it cannot be read at all.
    """
    try:
        archive = np.load(path, allow_pickle=False)
        if isinstance(archive, np.ndarray):
            raise ValueError("a single array, not an archive of arrays")
        with archive:
            missing = [name for name in names if name not in archive.files]
            if missing:
                raise ValueError(f"lacks {', '.join(missing)}; found {archive.files}, expected {', '.join(names)}")
            return {name: archive[name] for name in names}
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        raise ValueError(str(error)) from error
