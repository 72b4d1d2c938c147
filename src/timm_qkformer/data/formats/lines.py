"""Columns of numbers out of lines of text, ten times as fast as a parser that reads one number after the other.

Where every line has the same separators at the same places, and between them digits alone, numbers are worked out
column by column: the last digit of all lines, then the last but one, and so on. Anything else is left to numpy's own
parser of text, and what that does not take to the caller.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

_MOST_DIGITS = 18  # of int64
_MINUS, _POINT, _NEWLINE = ord("-"), ord("."), ord("\n")
_SEPARATORS = np.frombuffer(b",;\t ", np.uint8)
_SPACES = bytes.maketrans(b",;\t\n\r", b"     ")

Columns = list[NDArray[Any]]


def parse_lines(text: bytes, width: int) -> Columns | None:
    """Columns [N] of N lines of so many numbers, int64 where all have none but digits; None for anything else.

    Args:
        text: Whole lines, at least one number.
        width: Numbers of a line.
    """
    text = text.strip()
    text = (text.replace(b"\r\n", b"\n") if b"\r" in text else text) + b"\n"
    return _by_digits(text, width) or _one_by_one(text, width)


def _by_digits(text: bytes, width: int) -> Columns | None:
    letters = np.frombuffer(text, np.uint8)
    between = letters - ord("0") > 9  # unsigned: what comes before the digits is above them
    signs = text.count(b"-")
    if signs:
        between &= letters != _MINUS
    ends = np.flatnonzero(between)
    found = letters[ends]
    number = int(np.argmax(found == _NEWLINE)) + 1  # of a line's words: fractions are words of their own
    line = found[:number]
    points = line == _POINT
    if (
        len(ends) % number
        or number - int(points.sum()) != width
        or not np.isin(line[:-1][~points[:-1]], _SEPARATORS).all()
    ):
        return None
    if (found.reshape(-1, number) != line).any():
        return None
    starts = np.concatenate(([0], ends[:-1] + 1))
    negative = letters[starts] == _MINUS if signs else np.zeros(0, bool)
    if signs != np.count_nonzero(negative):
        return None
    digits = (ends - starts - negative if signs else ends - starts).reshape(-1, number)
    if digits.min() < 1 or digits.max() > _MOST_DIGITS:
        return None
    words = [_whole(letters, end, length) for end, length in zip(ends.reshape(-1, number).T, digits.T, strict=True)]
    if signs:
        for word, minus in zip(words, negative.reshape(-1, number).T, strict=True):
            np.negative(word, out=word, where=minus)
    return _joined(words, digits, points, signs > 0)


def _whole(letters: NDArray[np.uint8], ends: NDArray[np.intp], lengths: NDArray[np.intp]) -> NDArray[np.int64]:
    """Numbers whose digits end before these places."""
    shortest, longest = int(lengths.min()), int(lengths.max())
    ends = np.ascontiguousarray(ends)
    result = np.zeros(len(ends), np.int64)
    for place in range(longest):
        digits = letters[ends - (place + 1)] - ord("0")
        if place >= shortest:
            digits[lengths <= place] = 0
        result += digits.astype(np.int64) * 10**place
    return result


def _joined(
    words: list[NDArray[np.int64]], digits: NDArray[np.intp], points: NDArray[np.bool_], signed: bool
) -> Columns | None:
    """Words with those after a point joined to what stands before it."""
    columns: Columns = []
    at = 0
    while at < len(words):
        if not points[at]:
            columns.append(words[at])
            at += 1
            continue
        after = digits[:, at + 1]
        places = int(after[0])
        if signed or (after != places).any() or points[at + 1] or int(digits[:, at].max()) + places > _MOST_DIGITS:
            return None
        columns.append((words[at] * 10**places + words[at + 1]) / 10**places)
        at += 2
    return columns


def _one_by_one(text: bytes, width: int) -> Columns | None:
    letters = np.frombuffer(text, np.uint8)
    ends = np.flatnonzero(letters == _NEWLINE)
    separators = np.cumsum(np.isin(letters, _SEPARATORS))[ends]
    if (np.diff(separators, prepend=0) != width - 1).any():  # a line is short or long, or there are two in a row
        return None
    try:
        numbers = np.fromstring(text.translate(_SPACES), sep=" ")
    except (ValueError, DeprecationWarning):  # as new versions of numpy have it; older ones end early
        return None
    return list(numbers.reshape(-1, width).T) if len(numbers) == len(ends) * width else None
