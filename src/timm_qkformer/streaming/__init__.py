"""Step by step with explicit state: models that stop when they are sure, and recordings as they happen."""

from ..models import StreamState
from .anytime import Anytime, AnytimeResult, anytime
from .exits import EXITS, ExitRule, calibrated_rule

__all__ = ["EXITS", "Anytime", "AnytimeResult", "ExitRule", "StreamState", "anytime", "calibrated_rule"]
