"""Files that are complete or not there, and what is kept in them. Of the package only `errors` is imported here."""

import json
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import IO, Any, TypeVar

from .errors import first_line

T = TypeVar("T")


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Let the system's errors about no file, or about a temporary one, name `path`."""
    try:
        yield
    except OSError as error:
        named = str(error.filename or "")
        if error.errno is None or (named and Path(named).name[:1] + Path(named).suffix != "..tmp"):
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """A temporary file beside `path`, open for writing, that becomes `path` when the block ends without an error.

    A reader finds the former file or the whole new one, whoever else writes it. After an error, or when the disk is
    full, the former file is as it was and the temporary one is gone; one that a killed process left ends in ".tmp".
    OSError names `path`.
    """
    with _naming(path):
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    temporary = Path(name)
    try:
        with _naming(path):
            with os.fdopen(handle, "wb") as file:
                yield file
            temporary.chmod(0o644)  # mkstemp's are private
            temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_atomically(path: Path, text: str) -> None:
    """Write `path` through a temporary file beside it, in UTF-8."""
    with replacing(path) as file:
        file.write(text.encode("utf-8"))


def read_kept(path: Traversable, what: str, read: Callable[[Any], T]) -> T:
    """What an interrupted run goes on from, out of JSON.

    Args:
        path: The file.
        what: What to call its content, in the error.
        read: Makes of the file's value what it means; may raise whatever a wrong value leads to.

    Raises:
        ValueError: Naming the file, if it holds something else.
    """
    try:
        return read(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} is no {what} ({first_line(error)}): choose another folder") from error


def refuse_existing(*paths: Path) -> None:
    """Raise FileExistsError, naming them, if any of the files that are about to be written is there already."""
    found = [str(path) for path in paths if path.exists()]
    if found:
        verb = "exist" if len(found) > 1 else "exists"
        more = f" and {len(found) - 3} more" if len(found) > 3 else ""
        raise FileExistsError(
            f"{', '.join(found[:3])}{more} {verb} already and will not be overwritten; choose another folder"
        )
