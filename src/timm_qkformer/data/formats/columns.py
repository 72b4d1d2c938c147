"""Columns t, x, y and p of any dtype, as files of arrays and text have them: checked before they become events."""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..events import MOST_TIME, EventFileError, Events
from .findings import Findings

_MOST_PIXELS = 2**31
_MOST_SECONDS = 10**7  # a recording that lasts longer is not in seconds

# What columns are called, the first name that is there counts.
NAMES = {
    "t": ("t", "ts", "time", "timestamp", "timestamps"),
    "x": ("x", "xs"),
    "y": ("y", "ys"),
    "p": ("p", "ps", "on", "pol", "pols", "polarity", "polarities"),
}


def find_columns(found: Any) -> dict[str, str] | None:
    """The names of t, x, y and p among those that were found, in any case; None if one of them is missing."""
    lower = {str(name).strip().lower(): str(name) for name in found}
    names = {column: next((lower[name] for name in known if name in lower), None) for column, known in NAMES.items()}
    return None if None in names.values() else {key: name for key, name in names.items() if name is not None}


class Columns:
    """Turns chunks of columns into events; polarities must be of one kind in all chunks.

    Args:
        path: For errors.
        findings: Where times in seconds are noted.
        seconds: Whether times with fractions are seconds; else they are refused.
        offset: Added to all times, in microseconds.
    """

    def __init__(self, path: Path, findings: Findings, seconds: bool = False, offset: int = 0) -> None:
        self._path = path
        self._findings = findings
        self._may_be_seconds = seconds
        self._in_seconds: bool | None = None
        self._first: float | None = None
        self._offset = offset
        self._polarities: set[int] = set()

    def __call__(self, t: NDArray[Any], x: NDArray[Any], y: NDArray[Any], p: NDArray[Any]) -> Events:
        times = self._times(t)
        return Events(times, self._pixels(x, "x"), self._pixels(y, "y"), self._on(p))

    def _pixels(self, values: NDArray[Any], name: str) -> NDArray[np.int32]:
        return whole_numbers(values, name, self._path, 0, _MOST_PIXELS - 1).astype(np.int32, copy=False)

    def _times(self, t: NDArray[Any]) -> NDArray[np.int64]:
        if self._may_be_seconds and t.dtype.kind in "iuf":
            if self._in_seconds is None:
                self._in_seconds = t.dtype.kind == "f" and not _are_whole(t) and bool(np.isfinite(t).all())
            if self._in_seconds:
                return self._from_seconds(t)
        limit = MOST_TIME - abs(self._offset)
        times = whole_numbers(t, "t", self._path, -limit, limit).astype(np.int64, copy=False)
        return times + self._offset if self._offset else times

    def _from_seconds(self, t: NDArray[Any]) -> NDArray[np.int64]:
        if not np.isfinite(t).all():
            raise EventFileError(self._path, "t has numbers that are not finite")
        if self._first is None:
            self._first = float(t[0])
            self._findings.note("times have fractions: they are seconds")
        last = float(np.abs(t - self._first).max())
        if last > _MOST_SECONDS or abs(self._first) > 10**10:
            raise EventFileError(
                self._path,
                f"t has fractions and runs {last:g} from {self._first:g}: neither whole microseconds nor seconds",
            )
        return np.rint(t.astype(np.float64) * 1e6).astype(np.int64) + self._offset

    def _on(self, p: NDArray[Any]) -> NDArray[np.bool_]:
        if p.dtype == np.bool_:
            return p
        p = whole_numbers(p, "p", self._path, -1, 1)
        if p.size:
            low, zero = int(p.min()) < 0, bool((p == 0).any())
            self._polarities |= ({-1} if low else set()) | ({0} if zero else set())
            if len(self._polarities) > 1:
                raise EventFileError(self._path, "polarities are -1 and 0, expected 0 and 1, or -1 and 1")
        return p > 0


def whole_numbers(values: NDArray[Any], name: str, path: Path, low: int, high: int) -> NDArray[Any]:
    """Integers, or floats that are whole numbers, from low to high, as they are: nothing has wrapped around yet.

    Timestamps in seconds must not pass for microseconds.
    """
    kind = values.dtype.kind
    if kind not in "iuf" or (kind == "f" and not _are_whole(values)):
        unit = "whole microseconds" if name == "t" else "whole numbers"
        found = f"{values.dtype} with fractions or non-numbers" if kind == "f" else str(values.dtype)
        raise EventFileError(path, f"{name} needs to be {unit}, found {found}")
    if values.size:
        first, last = int(values.min()), int(values.max())
        if first < low or last > high:
            what = {"t": "timestamps run", "p": "polarities run"}.get(name, f"{name} runs")
            wanted = "0 and 1, or -1 and 1" if name == "p" else f"{low} to {high}"
            raise EventFileError(path, f"{what} from {first} to {last}, expected {wanted}")
    return values


def _are_whole(values: NDArray[Any]) -> bool:
    chunks = (values[start : start + 2**16] for start in range(0, len(values), 2**16))
    return all(bool((np.isfinite(chunk) & (chunk == np.floor(chunk))).all()) for chunk in chunks)
