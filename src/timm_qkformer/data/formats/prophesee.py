"""Prophesee's .raw: a text header, then EVT 2.0, 2.1 or 3.0 words.

Source: docs.prophesee.ai, "RAW File Format", "EVT 2.0 Format", "EVT 2.1 Format". EVT 3.0 is in `evt3`.
"""

import os
import re
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from ..events import EventFileError, Events
from .findings import Decoded, Findings, Unwrapper

_MOST_HEADER = 2**16  # bytes
_WORDS = 2**16  # of a chunk of EVT 2.0 and 3.0
_VECTORS = 2**14  # of a chunk of EVT 2.1, up to 32 events each
_MOST_SIDE = 2**14  # pixels
_SAMPLE = 2**13  # words that are looked at for their byte order
MOST_UNKNOWN = 100  # one word in so many of an unknown kind is damage; more, and it is another format

CD_OFF, CD_ON, TIME_HIGH = 0, 1, 8
_KNOWN = np.zeros(16, bool)
_KNOWN[[CD_OFF, CD_ON, TIME_HIGH, 10, 14, 15]] = True  # triggers, others, continued

Words = NDArray[np.unsignedinteger]


def open_raw(path: Path, file: BinaryIO, findings: Findings) -> Decoded:
    """Read the header, and choose the decoder and the byte order."""
    header = read_header(file)
    version = _version(header)
    if version is None:
        stated = header.get("format", header.get("evt", ""))
        raise EventFileError(path, f"its encoding is {stated!r}: EVT2, EVT2.1 and EVT3 are read")
    size = sensor_size(header, path)
    match = re.search(r"endianness=(\w+)", header.get("format", ""))
    stated = match.group(1) if match else header.get("endianness", "")
    if version == "EVT3":
        from .evt3 import decode_evt3, score_evt3

        order = _byte_order(file, stated, findings, {"little": "<u2", "big": ">u2"}, score_evt3, path)
        words = read_words(file, {"little": "<u2", "big": ">u2"}[order], 1, _WORDS, findings)
        return Decoded(version, decode_evt3(words, findings), size)
    if version == "EVT2":
        order = _byte_order(file, stated, findings, {"little": "<u4", "big": ">u4"}, _score_evt2, path)
        most = _words_left(file, 4)
        words = read_words(file, {"little": "<u4", "big": ">u4"}[order], 1, _WORDS, findings)
        return Decoded(version, _decode_evt2(words, findings), size, most)
    layouts = {"little": "<u4", "legacy": "<u4", "big": ">u4"}
    scores = {name: partial(_score_evt21, layout=name) for name in layouts}
    order = _byte_order(file, stated, findings, layouts, scores, path)
    halves = (_halves(words, order) for words in read_words(file, layouts[order], 2, _VECTORS, findings))
    return Decoded("EVT2.1", _decode_evt21(halves, findings), size)


def read_header(file: BinaryIO) -> dict[str, str]:
    """Lines "% keyword value" up to "% end" or the first other one, where the file then stands."""
    header: dict[str, str] = {}
    while file.tell() < _MOST_HEADER:
        start = file.tell()
        line = file.readline(_MOST_HEADER)
        if not _is_header_line(line):
            file.seek(start)
            break
        key, _, value = line[1:].strip().decode("utf-8", "replace").partition(" ")
        if key == "end":
            break
        header.setdefault(key.lower(), value.strip())
    return header


def _is_header_line(line: bytes) -> bool:
    """Data may begin with "%" as well, but hardly with a line of text."""
    if not line.startswith(b"% ") or not line.endswith(b"\n"):
        return False
    try:
        return line.decode("utf-8").strip().replace("\t", " ").isprintable()
    except UnicodeDecodeError:
        return False


def sensor_size(header: dict[str, str], path: Path) -> tuple[int, int] | None:
    """(height, width) as a header states it."""
    for pattern in (r"height=(?P<h>\d+)", r"width=(?P<w>\d+)"):
        if not re.search(pattern, header.get("format", "")):
            break
    else:
        stated = header["format"]
        height, width = (int(re.search(rf"{side}=(\d+)", stated)[1]) for side in ("height", "width"))  # type: ignore[index]
        return _plausible(height, width, path)
    match = re.fullmatch(r"(\d+)x(\d+)", header.get("geometry", ""))
    if match:
        return _plausible(int(match[2]), int(match[1]), path)
    if header.get("width", "").isdecimal() and header.get("height", "").isdecimal():
        return _plausible(int(header["height"]), int(header["width"]), path)
    return None


def _plausible(height: int, width: int, path: Path) -> tuple[int, int]:
    if not (0 < height <= _MOST_SIDE and 0 < width <= _MOST_SIDE):
        raise EventFileError(path, f"its header states a sensor of (height, width) {(height, width)}")
    return height, width


def _version(header: dict[str, str]) -> str | None:
    name = header.get("format", "").partition(";")[0].upper() or "EVT" + header.get("evt", "")
    return {
        "EVT2": "EVT2",
        "EVT2.0": "EVT2",
        "EVT21": "EVT2.1",
        "EVT2.1": "EVT2.1",
        "EVT3": "EVT3",
        "EVT3.0": "EVT3",
    }.get(name)


def _words_left(file: BinaryIO, size: int) -> int:
    return (os.fstat(file.fileno()).st_size - file.tell()) // size


def read_words(file: BinaryIO, dtype: str, per_record: int, records: int, findings: Findings) -> Iterator[Words]:
    """Words of the rest of a file, in chunks of whole records; bytes at its end that make none are counted."""
    kind = np.dtype(dtype)
    rest = (os.fstat(file.fileno()).st_size - file.tell()) % (kind.itemsize * per_record)
    if rest:
        findings.add("the file is cut: {n} bytes at its end are no whole record and were left out", rest)
    while True:
        words = np.fromfile(file, kind, records * per_record)
        whole = len(words) - len(words) % per_record
        if not whole:
            return
        yield words[:whole].astype(kind.newbyteorder("="), copy=False)


def _byte_order(
    file: BinaryIO,
    stated: str,
    findings: Findings,
    layouts: dict[str, str],
    score: Callable[[Words], int] | Mapping[str, Callable[[Words], int]],
    path: Path,
) -> str:
    """The order that the header states, unless the words make sense in another one alone. `score` counts nonsense."""
    start = file.tell()
    sample = file.read(_SAMPLE * 8)
    file.seek(start)
    whole = len(sample) - len(sample) % 8 or len(sample) - len(sample) % np.dtype(layouts["little"]).itemsize
    stated = stated if stated in layouts else "little"
    scores = {}
    for name, dtype in layouts.items():
        words = np.frombuffer(sample[:whole], dtype)
        words = words.astype(words.dtype.newbyteorder("="))
        scores[name] = (score[name] if isinstance(score, Mapping) else score)(words)
    best = min(scores, key=lambda name: (scores[name], name != stated))
    count = max(whole // np.dtype(layouts["little"]).itemsize, 1)
    if scores[stated] * MOST_UNKNOWN <= count:
        return stated
    if scores[best] * MOST_UNKNOWN > count:
        raise EventFileError(
            path, f"{scores[stated]:,} of its first {count:,} words are of no kind that its encoding has: damaged"
        )
    findings.add(f"its words are in {best} byte order, and not in {stated}")
    return best


def _score_evt2(words: Words) -> int:
    kinds = words >> 28
    return int(np.count_nonzero(~_KNOWN[kinds])) + (0 if (kinds == TIME_HIGH).any() else len(words))


def _score_evt21(words: Words, layout: str) -> int:
    """Pixels come in groups of 32: what does not begin at one is nonsense too."""
    high, _ = _halves(words, layout)
    kinds = high >> 28
    crooked = (kinds <= CD_ON) & ((high >> 11) & 31 != 0)
    return int(np.count_nonzero(~_KNOWN[kinds] | crooked)) + (0 if (kinds == TIME_HIGH).any() else len(high))


def _halves(words: Words, order: str) -> tuple[Words, Words]:
    """Upper and lower 32 bits of 64-bit words; "legacy" is the IMX636's little-endian order of either half."""
    pairs = words[: len(words) - len(words) % 2].reshape(-1, 2)
    return (pairs[:, 1], pairs[:, 0]) if order == "little" else (pairs[:, 0], pairs[:, 1])


def spread(values: NDArray, edges: NDArray, total: int, before: int) -> NDArray[np.int64]:
    """Repeat each of `values` from its edge to the next one, up to `total`; `before` stands before the first."""
    counts = np.diff(edges, prepend=0, append=total)
    return np.repeat(np.concatenate((np.array([before], np.int64), values.astype(np.int64))), counts)


class _Time:
    """The upper part of the timestamps of a stream of EVT 2 words."""

    def __init__(self, findings: Findings) -> None:
        self._unwrap = Unwrapper(28, findings)
        self._high = -1  # unknown before the first time word
        self._findings = findings

    def __call__(self, words: Words) -> tuple[NDArray[np.int64], NDArray[np.intp]]:
        """Microseconds of the upper part of the events' times, and where these stand."""
        kinds = words >> 28
        is_event = kinds <= CD_ON
        high = np.flatnonzero(kinds == TIME_HIGH)
        at = np.flatnonzero(is_event)
        unknown = len(words) - len(at) - len(high)
        if unknown:
            count_unknown(int(np.count_nonzero(~_KNOWN[kinds])), self._findings)
        values = self._unwrap((words[high] & 0xFFFFFFF).astype(np.int64))
        base = spread(values, np.searchsorted(at, high), len(at), self._high)
        if self._high < 0 and len(at) and base[0] < 0:
            timed = base >= 0
            count_untimed(len(at) - int(np.count_nonzero(timed)), self._findings)
            base, at = base[timed], at[timed]
        if len(values):
            self._high = int(values[-1])
        return base << 6, at


def count_unknown(count: int, findings: Findings) -> None:
    """Note words of kinds that the encoding has not."""
    findings.add("{n} words are of no kind that the encoding has and were left out", count)


def count_untimed(count: int, findings: Findings) -> None:
    """Note events before the first time word."""
    findings.add("{n} events come before the first time and were left out", count)


def _decode_evt2(chunks: Iterator[Words], findings: Findings) -> Iterator[Events]:
    """Bits 31-28 kind, 27-22 time, 21-11 x, 10-0 y; time words: 28 bits of time's upper part."""
    time = _Time(findings)
    for words in chunks:
        base, at = time(words)
        words = words[at]
        base |= (words >> 22) & 0x3F
        yield Events(base, ((words >> 11) & 0x7FF).astype(np.int16), (words & 0x7FF).astype(np.int16), words >= 1 << 28)


def _decode_evt21(chunks: Iterator[tuple[Words, Words]], findings: Findings) -> Iterator[Events]:
    """The upper half is as in EVT 2.0; each bit of the lower half is a pixel, the lowest one at x."""
    time = _Time(findings)
    for high, low in chunks:
        base, at = time(high)
        high, low = high[at], np.ascontiguousarray(low[at], "<u4")
        base |= (high >> 22) & 0x3F
        x, y = ((high >> shift & 0x7FF).astype(np.int16) for shift in (11, 0))
        bits = np.flatnonzero(np.unpackbits(low.view(np.uint8), bitorder="little").view(bool))
        word = bits >> 5
        yield Events(base[word], x[word] + (bits & 31).astype(np.int16), y[word], (high >= 1 << 28)[word])
