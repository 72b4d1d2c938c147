"""NumPy's files: .npz with the arrays t, x, y and p, and .npy with one structured array."""

import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

from ..arrays import ArrayFile, read_header
from ..events import EventFileError, Events
from .columns import NAMES, Columns, find_columns
from .findings import Decoded, Findings

_CHUNK = 2**15


def open_npz(path: Path, file: BinaryIO, findings: Findings) -> Decoded:
    """Check the headers of t, x, y and p, as spikingjelly stores them; they are unpacked side by side."""
    try:
        with ArrayFile(path, ("t", "x", "y", "p")) as archive:
            shapes = {name: header.shape for name, header in archive.headers.items()}
    except ValueError as error:
        raise EventFileError(path, f"is not a readable .npz file of events ({error})") from error
    if len(set(shapes.values())) > 1 or len(shapes["t"]) != 1:
        raise EventFileError(path, f"t, x, y, p need to be vectors of one length, found shapes {shapes}")
    return Decoded(".npz", _decode_npz(path, findings), most_events=shapes["t"][0], order="any")


def _decode_npz(path: Path, findings: Findings) -> Iterator[Events]:
    columns = Columns(path, findings)
    try:
        with ArrayFile(path, ("t", "x", "y", "p")) as archive:
            for t, x, y, p in archive.read_side_by_side(_CHUNK):
                yield columns(t, x, y, p)
    except EventFileError:
        raise
    except ValueError as error:
        raise EventFileError(path, f"is not a readable .npz file of events ({error})") from error


def open_npy(path: Path, file: BinaryIO, findings: Findings) -> Decoded:
    """One structured array with the fields t, x, y and p, under any of their usual names, as tonic has them."""
    try:
        shape, dtype = read_header(file)
    except Exception as error:  # numpy's parser of headers raises of all kinds
        raise EventFileError(path, f"is not a readable .npy file ({error})") from error
    names = find_columns(dtype.names or ())
    if dtype.hasobject or names is None or len(shape) != 1:
        fields = ", ".join("/".join(known[:2]) for known in NAMES.values())
        raise EventFileError(
            path, f"is a single array of {dtype} and shape {shape}, expected a vector with the fields {fields}"
        )
    rest = os.fstat(file.fileno()).st_size - file.tell()
    wanted = math.prod(shape) * dtype.itemsize
    if rest != wanted or shape[0] < 0:
        raise EventFileError(path, f"holds {rest} bytes, its header asks for {wanted}: {shape[0]} events of {dtype}")
    return Decoded(".npy", _decode_npy(path, file, findings, dtype, names), most_events=shape[0], order="any")


def _decode_npy(
    path: Path, file: BinaryIO, findings: Findings, dtype: np.dtype, names: dict[str, str]
) -> Iterator[Events]:
    columns = Columns(path, findings)
    while len(records := np.fromfile(file, dtype, _CHUNK)):
        yield columns(*(records[names[name]] for name in "txyp"))
