"""Recordings from one format to another, chunk by chunk."""

import math
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.lib import format as npy

from ..errors import import_extra
from ..files import replacing
from .events import Events
from .formats import Recording, open_events

_DTYPES = {"t": "<i8", "x": "<i4", "y": "<i4", "p": "|b1"}
_RECORD = np.dtype([("t", "<i8"), ("x", "<i2"), ("y", "<i2"), ("p", "<i1")])


def convert_events(
    source: str | Path,
    target: str | Path,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> int:
    """Write a recording in another format, which the target's suffix names: .npz, .npy, .csv, .dat or .h5.

    In constant memory. The target appears when it is complete.

    Args:
        source: A file of any format of `open_events`. What is repaired there is warned of once.
        target: The file to write.
        overwrite: Replace a file that is there.
        progress: Called with bytes read and bytes in all.

    Returns:
        How many events were written.

    Raises:
        FileExistsError: If the target is there, and `overwrite` is not set.
        ValueError: If the target's format cannot be written or cannot hold the recording.
        EventFileError: If the source cannot be read.
    """
    source, target = Path(source), Path(target)
    writer = _WRITERS.get(target.suffix.lower())
    if writer is None:
        raise ValueError(f"target={str(target)!r}: {target.suffix!r} is not written, only {', '.join(_WRITERS)}")
    if target.exists() and source.exists() and target.samefile(source):
        raise ValueError(f"target={str(target)!r} is the recording itself")
    if target.exists() and not overwrite:
        raise FileExistsError(f"{target} exists already and will not be overwritten; --force does")
    target.parent.mkdir(parents=True, exist_ok=True)
    count = 0

    def chunks(recording: Recording) -> Iterator[Events]:
        nonlocal count
        for chunk in recording:
            count += len(chunk)
            yield chunk
            if progress is not None:
                progress(recording.progress, recording.size)

    with open_events(source) as recording, replacing(target) as file:
        writer(file, chunks(recording), recording, target)
    return count


def _write_npz(file: IO[bytes], chunks: Iterator[Events], _: Recording, target: Path) -> None:
    """One array after the other, from temporary files beside the target."""
    spools = {name: tempfile.TemporaryFile(dir=target.parent) for name in _DTYPES}  # noqa: SIM115, closed below
    try:
        count = 0
        for chunk in chunks:
            count += len(chunk)
            for name, spool in spools.items():
                spool.write(getattr(chunk, name).astype(_DTYPES[name]).tobytes())
        with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
            for name, spool in spools.items():
                spool.seek(0)
                with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                    member.write(_header(np.dtype(_DTYPES[name]), count))
                    shutil.copyfileobj(spool, member, 2**20)
    finally:
        for spool in spools.values():
            spool.close()


def _header(dtype: np.dtype, count: int) -> bytes:
    """A .npy header of the same length for any count."""
    text = repr({"descr": npy.dtype_to_descr(dtype), "fortran_order": False, "shape": (count,)})
    length = 64 * math.ceil((len(text) + 32) / 64) + 128
    return b"\x93NUMPY\x01\x00" + (length - 10).to_bytes(2, "little") + text.encode().ljust(length - 11) + b"\n"


def _records(chunk: Events, target: Path) -> np.ndarray:
    for name in "xy":
        if int(getattr(chunk, name).max()) >= 2**15:
            raise ValueError(f"{target}: {name} reaches {int(getattr(chunk, name).max())}, more than the format holds")
    records = np.empty(len(chunk), _RECORD)
    for name in "txyp":
        records[name] = getattr(chunk, name)
    return records


def _write_npy(file: IO[bytes], chunks: Iterator[Events], _: Recording, target: Path) -> None:
    header = _header(_RECORD, 10**18)
    file.write(header)
    count = 0
    for chunk in chunks:
        count += len(chunk)
        file.write(_records(chunk, target).tobytes())
    file.seek(0)
    text = _header(_RECORD, count)
    file.write(b"\x93NUMPY\x01\x00" + (len(header) - 10).to_bytes(2, "little"))
    file.write(text[10:].rstrip().ljust(len(header) - 11) + b"\n")


def _write_csv(file: IO[bytes], chunks: Iterator[Events], recording: Recording, _: Path) -> None:
    file.write(b"t,x,y,p\n")
    for chunk in chunks:
        rows = np.stack([chunk.t, chunk.x, chunk.y, chunk.p.astype(np.int64)], 1)
        np.savetxt(file, rows, "%d", ",")


def _write_dat(file: IO[bytes], chunks: Iterator[Events], recording: Recording, target: Path) -> None:
    size = recording.sensor_size
    stated = f"% Height {size[0]}\n% Width {size[1]}\n" if size else ""
    file.write(f"% Data file containing CD events.\n% Version 2\n{stated}".encode() + b"\x0c\x08")
    for chunk in chunks:
        if int(chunk.t.min()) < 0 or int(chunk.t.max()) >= 2**32:
            raise ValueError(f"{target}: times reach {int(chunk.t.max())} microseconds; .dat holds 0 to {2**32 - 1}")
        if max(int(chunk.x.max()), int(chunk.y.max())) >= 2**14:
            raise ValueError(
                f"{target}: pixels reach {int(chunk.x.max())}, {int(chunk.y.max())}; .dat holds {2**14 - 1}"
            )
        address = chunk.x.astype(np.uint32) | chunk.y.astype(np.uint32) << 14 | chunk.p.astype(np.uint32) << 28
        file.write(np.stack([chunk.t.astype(np.uint32), address], 1).astype("<u4").tobytes())


def _write_hdf5(file: IO[bytes], chunks: Iterator[Events], recording: Recording, target: Path) -> None:
    h5py = import_extra("h5py", "events", "writing HDF5")
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as folder:
        path = Path(folder) / "events.h5"
        with h5py.File(path, "w") as archive:
            _fill_hdf5(archive.create_group("events"), chunks, recording)
        with path.open("rb") as written:
            shutil.copyfileobj(written, file, 2**20)


def _fill_hdf5(group: Any, chunks: Iterator[Events], recording: Recording) -> None:
    datasets = {
        name: group.create_dataset(name, (0,), dtype, maxshape=(None,), chunks=(2**16,), compression="gzip")
        for name, dtype in {**_DTYPES, "p": "u1"}.items()
    }
    if recording.sensor_size:
        group.attrs["sensor_resolution"] = recording.sensor_size
    count = 0
    for chunk in chunks:
        stop = count + len(chunk)
        for name, dataset in datasets.items():
            dataset.resize((stop,))
            dataset[count:stop] = getattr(chunk, name)
        count = stop


_WRITERS: dict[str, Callable[[IO[bytes], Iterator[Events], Recording, Path], None]] = {
    ".npz": _write_npz,
    ".npy": _write_npy,
    ".csv": _write_csv,
    ".dat": _write_dat,
    ".h5": _write_hdf5,
}
