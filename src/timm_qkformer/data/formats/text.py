"""Text: a line an event, columns in an order that a first line names or that their content tells."""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from ..events import EventFileError, Events
from .columns import Columns, find_columns
from .findings import Decoded, Findings
from .lines import parse_lines

_BLOCK = 2**18  # bytes
_LONGEST_LINE = 2**12
_HEAD = 2**16  # bytes that the order of columns is guessed from
# Orders without a line of names: the Robotics and Perception Group's, Metavision's, tonic's.
_ORDERS = ("txyp", "xypt", "xytp")
_SPLIT = re.compile(rb"[,;\t ]+")


def open_text(path: Path, file: BinaryIO, findings: Findings) -> Decoded:
    """Find out what stands in which column; comments (#, %) may come first, and a line "width height"."""
    size: tuple[int, int] | None = None
    names: list[str] | None = None
    while True:
        start = file.tell()
        line = file.readline(_LONGEST_LINE).strip()
        if not line:
            raise EventFileError(path, "is text without four columns of numbers")
        words = _SPLIT.split(line.lstrip(b"#% "))
        if all(_is_number(word) for word in words) and not line.startswith((b"#", b"%")):
            if len(words) == 2 and size is None and words[0].isdigit() and words[1].isdigit():
                size = (int(words[1]), int(words[0]))
                continue
            file.seek(start)
            break
        known = find_columns(word.decode("latin-1").strip("\"'") for word in words)
        if known is not None:
            names = [word.decode("latin-1").strip("\"'") for word in words]
        elif not line.startswith((b"#", b"%")):
            raise EventFileError(path, f"is text, and neither names of columns nor numbers are in {line[:60]!r}")
    if size is not None and not 0 < min(size) <= max(size) < 2**14:
        raise EventFileError(path, f"states a sensor of (height, width) {size}")
    columns = _columns(path, file, names, len(words))
    decoded = _decode(path, file, findings, columns, len(words))
    return Decoded("text, columns " + ", ".join(columns), decoded, size)


def _is_number(word: bytes) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return b"_" not in word  # which Python takes for a part of a number


def _columns(path: Path, file: BinaryIO, names: list[str] | None, width: int) -> dict[str, int]:
    """The place of t, x, y and p in a line."""
    if names is not None:
        known = find_columns(names)
        if known is None or len(names) != width:
            raise EventFileError(path, f"names the columns {names}, its lines have {width} numbers")
        return {column: names.index(name) for column, name in known.items()}
    if width != 4:
        raise EventFileError(path, f"has lines of {width} numbers; other than 4 need a first line of names, t,x,y,p")
    start = file.tell()
    sample = file.read(_HEAD)
    file.seek(start)
    sample = sample[: sample.rfind(b"\n") + 1] or sample
    table = parse_lines(sample, 4)
    if table is None:
        table = _whole_lines(path, sample, 4, 1, Findings())
    fitting = [order for order in _ORDERS if _fits(table, order)]
    if len(fitting) > 1:  # x that does not fall looks like a time: the time runs further
        spans = {order: np.ptp(table[order.index("t")]) for order in fitting}
        fractions = [order for order in fitting if (table[order.index("t")] % 1 != 0).any()]
        fitting = fractions or [order for order in fitting if spans[order] == max(spans.values())]
    if len(fitting) != 1:
        orders = ", ".join(_ORDERS)
        hint = "put a first line of names, such as t,x,y,p"
        raise EventFileError(path, f"does not show which column is which ({orders}); {hint}")
    return {name: fitting[0].index(name) for name in "txyp"}


def _fits(table: Sequence[NDArray[Any]], order: str) -> bool:
    t, x, y, p = (table[order.index(name)] for name in "txyp")
    whole = all((column % 1 == 0).all() and (column >= 0).all() for column in (x, y))
    steps = np.diff(t)
    in_order = not len(steps) or bool(np.mean(steps >= 0) > 0.99)
    return bool(np.isin(p, (-1, 0, 1)).all()) and whole and in_order


def _decode(path: Path, file: BinaryIO, findings: Findings, columns: dict[str, int], width: int) -> Iterator[Events]:
    events = Columns(path, findings, seconds=True)
    line = 1
    while block := file.read(_BLOCK):
        block += file.readline(_LONGEST_LINE)
        if not block.endswith(b"\n") and len(block) >= _BLOCK:
            raise EventFileError(path, f"has a line of more than {_LONGEST_LINE} bytes after line {line}")
        table = parse_lines(block, width) if block.strip() else []
        if table is None:
            table = _whole_lines(path, block, width, line, findings)
        line += block.count(b"\n")
        if len(table) and len(table[0]):
            yield events(*(table[columns[name]] for name in "txyp"))


def _whole_lines(path: Path, block: bytes, width: int, line: int, findings: Findings) -> list[NDArray[Any]]:
    """The columns of a block in which not all are sound: empty ones and a last one that is cut are left out."""
    lines = block.split(b"\n")
    rows = []
    for number, text in enumerate(lines):
        words = [word for word in _SPLIT.split(text.strip()) if word]
        if not words:
            continue
        if len(words) == width and all(_is_number(word) for word in words):
            rows.append([float(word) for word in words])
        elif number == len(lines) - 1 and len(words) < width:
            findings.add("the file is cut: {n} bytes at its end are no whole line and were left out", len(text))
        else:
            raise EventFileError(path, f"line {line + number} of events is {text[:60]!r}, expected {width} numbers")
    return list(np.array(rows).reshape(-1, width).T)
