"""Files of event cameras: one module for each format, in `recording` what they share."""

from .findings import Findings
from .recording import (
    EVENT_SUFFIXES,
    TEXT_SUFFIXES,
    EventFileWarning,
    Recording,
    iter_events,
    open_events,
    read_events,
)

__all__ = [
    "EVENT_SUFFIXES",
    "TEXT_SUFFIXES",
    "EventFileWarning",
    "Findings",
    "Recording",
    "iter_events",
    "open_events",
    "read_events",
]
