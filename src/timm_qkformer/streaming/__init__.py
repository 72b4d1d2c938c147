"""Step by step with explicit state: models that stop when they are sure, and recordings as they happen."""

from ..models import StreamState
from .anytime import Anytime, AnytimeResult, anytime
from .exits import EXITS, ExitRule, calibrated_rule
from .report import StreamReport
from .stream import Prediction, stream
from .windows import Window, cut_windows

__all__ = [
    "EXITS",
    "Anytime",
    "AnytimeResult",
    "ExitRule",
    "Prediction",
    "StreamReport",
    "StreamState",
    "Window",
    "anytime",
    "calibrated_rule",
    "cut_windows",
    "stream",
]
