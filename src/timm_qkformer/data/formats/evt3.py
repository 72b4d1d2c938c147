"""EVT 3.0: 16-bit words that each change a part of the state (time, row, column, polarity) or give events.

Source: docs.prophesee.ai, "EVT 3.0 Format". The decoder has no loop over words: for each part of the state, the value
that was set last is repeated up to where it is set again.
"""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from ..events import Events
from .findings import Findings, Unwrapper
from .prophesee import MOST_UNKNOWN, Words, count_unknown, count_untimed, spread

ADDR_Y, ADDR_X, VECT_BASE_X, VECT_12, VECT_8, TIME_LOW, TIME_HIGH = 0, 2, 3, 4, 5, 6, 8
_KNOWN = np.zeros(16, bool)
_KNOWN[[ADDR_Y, ADDR_X, VECT_BASE_X, VECT_12, VECT_8, TIME_LOW, 7, TIME_HIGH, 10, 14, 15]] = True
_EMITS = np.zeros(16, bool)
_EMITS[[ADDR_X, VECT_12, VECT_8]] = True


def score_evt3(words: Words) -> int:
    """How many words make no sense."""
    kinds = words >> 12
    wide = (kinds == VECT_8) & (words & 0xF00 != 0)
    low_before_high = 0 if (kinds == TIME_HIGH).any() else len(words) // MOST_UNKNOWN + 1
    return int(np.count_nonzero(~_KNOWN[kinds] | wide)) + low_before_high


class _Time:
    """Microseconds as TIME_HIGH (12 upper bits of 24) and TIME_LOW set them; a high word sets the lower bits to 0."""

    def __init__(self, findings: Findings) -> None:
        self._unwrap = Unwrapper(12, findings)
        self._high = -1
        self.now = -1  # unknown

    def __call__(self, words: Words, is_high: NDArray[np.bool_]) -> NDArray[np.int64]:
        """The time after each of these time words, below 0 before the first high one."""
        at = np.flatnonzero(is_high)
        highs = self._unwrap((words[at] & 0xFFF).astype(np.int64))
        t = spread(highs, at, len(words), self._high) << 12
        t |= np.where(is_high, 0, words & 0xFFF)
        if len(highs):
            self._high = int(highs[-1])
        if len(t):
            self.now = int(t[-1])
        return t


class _Columns:
    """Columns and polarities: a single event brings them along, vectors go on from VECT_BASE_X."""

    def __init__(self) -> None:
        self._base = 0  # 11 bits of x, then the polarity
        self._done = 0  # columns that vectors have passed since

    def __call__(
        self, words: Words, kinds: NDArray[np.unsignedinteger], bases: Words, edges: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Column of each word that gives events, and the word with its polarity; bases stand at `edges` among them."""
        single = kinds == ADDR_X
        value = (words & 0xFFF).astype(np.int64)
        width = np.where(single, 0, np.where(kinds == VECT_12, 12, 8))
        passed = np.cumsum(width) - width  # before each word, in this chunk
        at_base = np.append(passed, passed[-1] + width[-1])[edges]
        base = spread(bases & 0xFFF, edges, len(words), self._base)
        origin = spread(at_base, edges, len(words), -self._done)
        word = np.where(single, value, base)
        column = (word & 0x7FF) + np.where(single, 0, passed - origin)
        total = int(passed[-1] + width[-1])
        if len(bases):
            self._base = int(bases[-1]) & 0xFFF
            self._done = total - int(at_base[-1])
        else:
            self._done += total
        return column, word

    def skip(self, bases: Words) -> None:
        """A chunk without events."""
        if len(bases):
            self._base, self._done = int(bases[-1]) & 0xFFF, 0


def decode_evt3(chunks: Iterator[Words], findings: Findings) -> Iterator[Events]:
    """Events of chunks of words."""
    time, columns = _Time(findings), _Columns()
    row = 0
    for words in chunks:
        kinds = words >> 12
        emits = _EMITS[kinds]
        count_unknown(int(np.count_nonzero(~_KNOWN[kinds])), findings)
        before = np.cumsum(emits)  # words that give events, up to each word
        is_low, is_high = kinds == TIME_LOW, kinds == TIME_HIGH
        timed, rows, bases = np.flatnonzero(is_low | is_high), np.flatnonzero(kinds == ADDR_Y), kinds == VECT_BASE_X
        started = time.now
        moments = time(words[timed], is_high[timed])
        total = int(before[-1])
        row_words = words[rows] & 0x7FF
        if total:
            t = spread(moments, before[timed], total, started)
            y = spread(row_words, before[rows], total, row).astype(np.int16)
            giving = words[emits]
            column, word = columns(giving, kinds[emits], words[bases], before[bases])
            yield _expanded(t, column, y, word, giving, findings, started < 0)
        else:
            columns.skip(words[bases])
        if len(row_words):
            row = int(row_words[-1])


def _expanded(
    t: NDArray[np.int64],
    column: NDArray[np.int64],
    y: NDArray[np.int16],
    word: NDArray[np.int64],
    words: Words,
    findings: Findings,
    check_start: bool,
) -> Events:
    """One event for each word, or for each bit of a vector's."""
    p, x = word >= 0x800, np.minimum(column, 0x7FFF).astype(np.int16)
    kinds = words >> 12
    vectors = kinds != ADDR_X
    if vectors.any():
        masks = np.where(vectors, words & np.where(kinds == VECT_8, 0xFF, 0xFFF).astype(np.uint16), 1).astype("<u2")
        bits = np.flatnonzero(np.unpackbits(masks.view(np.uint8), bitorder="little").view(bool))
        source = bits >> 4
        t, y, p, x = t[source], y[source], p[source], x[source] + (bits & 15).astype(np.int16)
    if check_start and len(t) and t[0] < 0:
        known = t >= 0
        count_untimed(len(t) - int(np.count_nonzero(known)), findings)
        t, x, y, p = t[known], x[known], y[known], p[known]
    return Events(t, x, y, p)
