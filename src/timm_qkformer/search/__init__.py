"""Search for architectures: spaces of model arguments, scores that need no training, and an evolution over both."""

from .evolution import Candidate, Evolution, SearchState, evolve
from .scores import SCORES, score_model
from .spaces import SPACES, Genome, Space

__all__ = [
    "SCORES",
    "SPACES",
    "Candidate",
    "Evolution",
    "Genome",
    "SearchState",
    "Space",
    "evolve",
    "score_model",
]
