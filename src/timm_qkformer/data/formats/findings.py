"""What was found in a recording that is not as it should be, counted; and what a decoder hands over."""

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from ..events import Events

PAUSE = 60_000_000  # microseconds without an event that are worth a word


class Findings:
    """Repairs and oddities of a recording: kinds, each with how often and how much at most.

    `notes` are those that are part of the format and need no warning, such as a clock that wrapped.
    """

    def __init__(self) -> None:
        self._found: dict[str, list[int]] = {}
        self._notes: dict[str, list[int]] = {}

    def add(self, text: str, count: int = 1, largest: int = 0) -> None:
        """Count something that a user must know: `text` with {n} for the count and {most} for the largest."""
        _count(self._found, text, count, largest)

    def note(self, text: str, count: int = 1, largest: int = 0) -> None:
        """Count something that is as it should be."""
        _count(self._notes, text, count, largest)

    def count(self, text: str) -> int:
        """How often `text` was added."""
        return self._found.get(text, [0])[0]

    @property
    def repairs(self) -> list[str]:
        """What a user must know, a line each."""
        return _texts(self._found)

    @property
    def notes(self) -> list[str]:
        """What else was seen, a line each."""
        return _texts(self._notes)

    def __bool__(self) -> bool:
        return bool(self._found)

    def __str__(self) -> str:
        return "; ".join(self.repairs)


def _count(kinds: dict[str, list[int]], text: str, count: int, largest: int) -> None:
    if count:
        kind = kinds.setdefault(text, [0, 0])
        kind[0] += count
        kind[1] = max(kind[1], largest)


def _texts(kinds: dict[str, list[int]]) -> list[str]:
    return [text.format(n=f"{count:,}", most=f"{most:,}") for text, (count, most) in kinds.items()]


@dataclass
class Decoded:
    """What a format's module gives for a file: what its header says, and chunks that are decoded when asked for."""

    format: str
    chunks: Iterator[Events]  # decoded and not yet checked
    sensor_size: tuple[int, int] | None = None  # (height, width), if the file states it
    most_events: int | None = None  # no more than these
    # What is done about time that runs backwards: "count" keeps and counts it, "refuse" refuses the file, "any" says
    # nothing, for formats that have no order.
    order: str = "count"
    outside: str = "drop"  # events off the stated sensor: left out and counted, or "refuse"
    details: dict[str, str] = field(default_factory=dict)  # such as the camera's name


class Unwrapper:
    """A counter of so many bits as one that does not wrap around: a step back of more than half its range is a wrap.

    Call it with the counter's values in their order, chunk after chunk.
    """

    def __init__(self, bits: int, findings: Findings) -> None:
        self._range = 1 << bits
        self._findings = findings
        self._offset = 0
        self.last: int | None = None  # the counter as it was read

    def __call__(self, values: NDArray[np.int64]) -> NDArray[np.int64]:
        if not len(values):
            return values
        first = values[0] if self.last is None else self.last
        steps = np.diff(values, prepend=first)
        wraps = steps < -self._range // 2
        self.last = int(values[-1])
        if not wraps.any():
            return values + self._offset if self._offset else values
        loops = np.cumsum(wraps)
        self._findings.note("the clock wrapped {n} times", int(loops[-1]))
        result = values + (loops * self._range + self._offset)
        self._offset += int(loops[-1]) * self._range
        return result
