"""HDF5: datasets t, x, y and p in a group (DSEC, plain files, MATLAB 7.3), or one compound dataset (Prophesee)."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from ...errors import import_extra
from ..arrays import MOST_BYTES, MOST_RATIO
from ..events import EventFileError, Events
from .columns import Columns, find_columns
from .findings import Decoded, Findings

if TYPE_CHECKING:
    import h5py

_CHUNK = 2**16
_ECF = 0x8ECF  # Prophesee's codec, registered with the HDF Group
_MOST_OBJECTS = 1000
_NO_ECF = (
    "is compressed with Prophesee's ECF codec. Convert it with Metavision's metavision_file_to_csv or to .raw or .dat, "
    "or install Prophesee's plugin (github.com/prophesee-ai/hdf5_ecf) and set HDF5_PLUGIN_PATH to its folder"
)


def open_hdf5(path: Path, _file: BinaryIO, findings: Findings) -> Decoded:
    """Find the events, and check what the file says of them before anything is unpacked."""
    h5py = import_extra("h5py", "events", f"reading {path.name}")
    archive = h5py.File(path, "r", locking=False)
    names, owner = _find(path, archive)
    whole = isinstance(owner, h5py.Dataset)
    datasets = {"txyp": owner} if whole else {key: owner[name] for key, name in names.items()}
    lengths = {key: dataset.shape for key, dataset in datasets.items()}
    vectors = {key: tuple(n for n in shape if n != 1) or (1,) for key, shape in lengths.items()}  # MATLAB's are 1 x N
    if len(set(vectors.values())) > 1 or len(next(iter(vectors.values()))) != 1:
        raise EventFileError(path, f"t, x, y, p need to be vectors of one length, found shapes {lengths}")
    (count,) = next(iter(vectors.values()))
    stored = 0
    for dataset in datasets.values():
        _check_filters(path, dataset)
        stored += dataset.id.get_storage_size()
    unpacked = sum(dataset.dtype.itemsize for dataset in datasets.values()) * count
    size = path.stat().st_size
    if stored > size or unpacked > max(MOST_BYTES, MOST_RATIO * size):
        raise EventFileError(path, f"{size} bytes that unpack to {unpacked}, more than {MOST_RATIO} times as many")
    offset = _offset(path, archive, owner)
    columns = Columns(path, findings, seconds=True, offset=offset)
    chunks = _compound(owner, names, count, columns) if whole else _separate(datasets, count, columns)
    return Decoded("HDF5", chunks, _size(owner), count, details={"group": owner.name})


def _find(path: Path, archive: "h5py.File") -> tuple[dict[str, str], Any]:
    """Names of the columns, and the group or compound dataset that has them. Links out of the file are not followed."""
    import h5py

    found: list[tuple[dict[str, str], Any]] = []
    seen = 0

    def here(group: Any, name: str) -> bool:
        return isinstance(group.get(name, getlink=True), h5py.HardLink)

    def visit(group: Any, depth: int) -> None:
        nonlocal seen
        names = find_columns(group)
        if names and all(here(group, name) and isinstance(group[name], h5py.Dataset) for name in names.values()):
            found.append((names, group))
            return
        for name in group:
            seen += 1
            if seen > _MOST_OBJECTS or depth > 4 or not here(group, name):
                continue
            item = group[name]
            if isinstance(item, h5py.Group):
                visit(item, depth + 1)
            elif isinstance(item, h5py.Dataset) and (fields := find_columns(item.dtype.names or ())):
                found.append((fields, item))

    visit(archive, 0)
    if len(found) != 1:
        where = ", ".join(owner.name for _, owner in found[:5])
        several = f"has events in several places, {where}" if found else "has no datasets t, x, y and p"
        raise EventFileError(path, several)
    return found[0]


def _check_filters(path: Path, dataset: "h5py.Dataset") -> None:
    import h5py

    if dataset.is_virtual or dataset.external:
        raise EventFileError(path, f"{dataset.name} lies in other files, which are not opened")
    properties = dataset.id.get_create_plist()
    filters = [properties.get_filter(i)[0] for i in range(properties.get_nfilters())]
    if dataset.chunks and math.prod(dataset.chunks) * dataset.dtype.itemsize > MOST_BYTES:
        raise EventFileError(path, f"{dataset.name} is stored in pieces of {dataset.chunks}, which are not unpacked")
    missing = [code for code in filters if not h5py.h5z.filter_avail(code)]
    if missing and _ECF not in missing:
        doing = f"reading {path.name}, whose HDF5 filters {missing} h5py does not have,"
        import_extra("hdf5plugin", "events", doing)  # which makes itself known to h5py
        missing = [code for code in missing if not h5py.h5z.filter_avail(code)]
    if _ECF in missing:
        raise EventFileError(path, _NO_ECF)
    if missing:
        raise EventFileError(path, f"{dataset.name} is compressed with HDF5 filters {missing}, which are not installed")


def _offset(path: Path, archive: "h5py.File", owner: Any) -> int:
    """DSEC's t_offset in microseconds, beside the events or at the top."""
    for group in (owner.parent, archive):
        dataset = group.get("t_offset")
        if dataset is not None:
            value = int(np.asarray(dataset).ravel()[0])
            if abs(value) >= 2**61:
                raise EventFileError(path, f"t_offset is {value} microseconds")
            return value
    return 0


def _size(owner: Any) -> tuple[int, int] | None:
    """(height, width), as files of rpg_e2vid and of Prophesee state it in attributes."""
    for group in (owner, owner.parent, owner.file):
        stated = group.attrs.get("sensor_resolution", ())
        if len(np.shape(stated)) == 1 and len(stated) == 2 and 0 < min(stated) and max(stated) < 2**14:
            return int(stated[0]), int(stated[1])
        geometry = group.attrs.get("geometry", "")
        text = geometry.decode("ascii", "replace") if isinstance(geometry, bytes) else str(geometry)
        width, _, height = text.partition("x")
        if width.isdecimal() and height.isdecimal() and 0 < min(int(width), int(height)):
            return int(height), int(width)
    return None


def _separate(datasets: dict[str, Any], count: int, columns: Columns) -> Iterator[Events]:
    for start in range(0, count, _CHUNK):
        part = slice(start, min(start + _CHUNK, count))
        yield columns(*(_vector(datasets[name], part) for name in "txyp"))


def _vector(dataset: Any, part: slice) -> Any:
    axis = int(np.argmax(dataset.shape)) if dataset.ndim else 0
    return dataset[tuple(part if i == axis else 0 for i in range(dataset.ndim))]


def _compound(dataset: Any, names: dict[str, str], count: int, columns: Columns) -> Iterator[Events]:
    for start in range(0, count, _CHUNK):
        records = dataset[start : start + _CHUNK]
        yield columns(*(records[names[name]] for name in "txyp"))
