"""Arrays from .npz files that may be anything: headers are compared with the file before memory is taken.

A header of a few bytes can ask for 10^12 elements, and a few megabytes of zeros unpack to gigabytes. So every array's
shape and dtype must account for what the archive holds of it, to the byte, and what is unpacked is bounded by the
file's own size.
"""

import math
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import IO, Any, NamedTuple

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

# What is unpacked may be this many times the file, or so many bytes. Recordings are a tenth of that apart: of t, x, y
# and p at least the times differ from event to event.
MOST_RATIO, MOST_BYTES = 64, 2**26

_MAGIC = b"\x93NUMPY"


class Header(NamedTuple):
    """What the file says of an array."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]


class ArrayFile:
    """An .npz file, open for reading: `headers` of the arrays that are asked for, and `read`.

    A context manager that turns whatever goes wrong in it, short of an OSError, into a ValueError.

    Args:
        path: The file.
        names: Names of the arrays that it must hold.

    Raises:
        ValueError: If it is not a sound .npz file with these arrays.
        OSError: If it cannot be read at all.
    """

    def __init__(self, path: Path, names: Sequence[str]) -> None:
        self.path = path
        self.names = names

    def __enter__(self) -> "ArrayFile":
        try:
            self._open()
        except (OSError, ValueError):
            raise
        except Exception as error:  # zipfile and numpy's parser of headers raise of all kinds
            raise ValueError(_words(error)) from error
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._archive.close()
        if isinstance(exc, Exception) and not isinstance(exc, (OSError, ValueError)):
            raise ValueError(_words(exc)) from exc

    def read(self, name: str) -> NDArray[Any]:
        """The array, whose checksum holds."""
        with self._archive.open(f"{name}.npy") as member:
            array = npy.read_array(member, allow_pickle=False)
            member.read(1)  # the end, where the checksum is compared
        return array

    def read_side_by_side(self, length: int) -> Iterator[tuple[NDArray[Any], ...]]:
        """Parts of so many elements of all arrays, which must be vectors of one length; checksums hold at the end."""
        with ExitStack() as stack:
            members = [stack.enter_context(self._archive.open(f"{name}.npy")) for name in self.names]
            for member in members:
                read_header(member)
            dtypes = [self.headers[name].dtype for name in self.names]
            (count,) = self.headers[self.names[0]].shape
            for start in range(0, count, length):
                now = min(length, count - start)
                yield tuple(_part(member, dtype, now) for member, dtype in zip(members, dtypes, strict=True))
            for member in members:
                member.read(1)  # the end, where the checksum is compared

    def _open(self) -> None:
        with self.path.open("rb") as file:
            if file.read(len(_MAGIC)) == _MAGIC:
                raise ValueError("a single array, not an archive of arrays")
        self._archive = zipfile.ZipFile(self.path)
        try:
            found = [name.removesuffix(".npy") for name in self._archive.namelist()]
            missing = [name for name in self.names if name not in found]
            if missing:
                raise ValueError(f"lacks {', '.join(missing)}; found {found[:10]}, expected {', '.join(self.names)}")
            self.headers = {name: self._header(name) for name in self.names}
            size = self.path.stat().st_size
            unpacked = sum(self._archive.getinfo(f"{name}.npy").file_size for name in self.names)
            if unpacked > max(MOST_BYTES, MOST_RATIO * size):
                raise ValueError(f"{size} bytes that unpack to {unpacked}, more than {MOST_RATIO} times as many")
        except BaseException:
            self._archive.close()
            raise

    def _header(self, name: str) -> Header:
        info = self._archive.getinfo(f"{name}.npy")
        with self._archive.open(info) as member:
            shape, dtype = read_header(member)
            start = member.tell()
        if dtype.hasobject:
            raise ValueError(f"{name} holds Python objects, which are not unpickled")
        wanted = start + math.prod(shape) * dtype.itemsize
        if min(shape, default=0) < 0 or wanted != info.file_size:
            raise ValueError(
                f"{name} is {info.file_size} bytes, its header asks for {wanted}: {dtype} of shape {shape}"
            )
        return Header(shape, dtype)


def _part(member: IO[bytes], dtype: np.dtype[Any], count: int) -> NDArray[Any]:
    content = member.read(count * dtype.itemsize)
    if len(content) != count * dtype.itemsize:
        raise ValueError("an array ends early")
    return np.frombuffer(content, dtype)


def read_header(member: IO[bytes]) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Shape and dtype of a .npy file, which then stands at the array's first byte."""
    version = npy.read_magic(member)
    if version == (1, 0):
        shape, _, dtype = npy.read_array_header_1_0(member)
    elif version == (2, 0):
        shape, _, dtype = npy.read_array_header_2_0(member)
    else:
        raise ValueError(f"arrays of format version {version}, expected 1.0 or 2.0")
    return shape, dtype


def _words(error: Exception) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def load_arrays(path: Path, names: Sequence[str]) -> dict[str, NDArray[Any]]:
    """Load arrays of an .npz file, never unpickling; errors are those of `ArrayFile`."""
    with ArrayFile(path, names) as file:
        return {name: file.read(name) for name in names}
