"""Files that `torch.save` wrote: checksums are compared before anything is read, and threads do not disturb each other.

Every reader of checkpoints uses this: the trainer's, `convert`'s and that of pretrained weights. Nothing of the package
is imported here.
"""

import argparse
import pickle
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Lock
from typing import Any

import torch

_ATTEMPTS = 5
# Not the class alone: that is the entry which other readers, timm's for one, add for a while and take away again.
_NAMESPACE = (argparse.Namespace, "argparse.Namespace")
_lock = Lock()
_readers = 0


class DamagedFileError(Exception):
    """A file is not as it was written."""


def check_records(archive: zipfile.ZipFile) -> None:
    """Compare every stored record of a zip with its checksum (CRC-32); PyTorch does not where it maps the file.

    Raises:
        DamagedFileError: Naming the record that is not as it was written.
        zipfile.BadZipFile, OSError, ...: Whatever `zipfile` raises for headers that are damaged.
    """
    damaged = archive.testzip()
    if damaged is not None:
        raise DamagedFileError(f"the record {damaged[:80]!r} does not match its checksum")


def check_file(path: Path) -> None:
    """Check the records of `path`, if it is a zip; other containers are left to their readers.

    Raises:
        DamagedFileError: If anything in it is not as it was written.
        OSError: If it cannot be opened.
    """
    with path.open("rb") as file:
        if file.read(4) != b"PK\x03\x04":
            return
    try:
        with zipfile.ZipFile(path) as archive:
            # Compressed records are checked as they are unpacked, and could be a bomb here.
            if all(record.compress_type == zipfile.ZIP_STORED for record in archive.infolist()):
                check_records(archive)
    except (zipfile.BadZipFile, NotImplementedError, EOFError, RuntimeError, ValueError, LookupError) as error:
        raise DamagedFileError(f"its zip directory is damaged ({error})") from error


@contextmanager
def namespaces_allowed() -> Iterator[None]:
    """Let `torch.load(weights_only=True)` build an `argparse.Namespace`, as training checkpoints hold, in this block.

    PyTorch keeps what is allowed in one set for the whole process. So that threads may read at the same time, the
    first one adds the class and the last one takes it away.
    """
    global _readers
    permission = torch.serialization.safe_globals([_NAMESPACE])
    with _lock:
        _readers += 1
        permission.__enter__()
    try:
        yield
    finally:
        with _lock:
            _readers -= 1
            if not _readers:
                permission.__exit__(None, None, None)


def load_restricted(path: Path, mmap: bool = False) -> Any:
    """`torch.load(weights_only=True)` to the CPU, which also takes `argparse.Namespace`; any number of threads may.

    Args:
        path: A file whose records have been checked.
        mmap: Leave the tensors on the disk until they are looked at.

    Raises:
        Exception: Whatever PyTorch raises for a file that it cannot read.
    """
    for attempt in range(_ATTEMPTS):
        with namespaces_allowed():
            try:
                return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
            except pickle.UnpicklingError as error:
                # PyTorch's set has no lock: another library's thread that changes it at the same time may undo ours.
                if "argparse.Namespace" not in str(error) or attempt == _ATTEMPTS - 1:
                    raise
    raise AssertionError("unreachable")
