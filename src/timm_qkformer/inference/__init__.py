"""Fast inference: `deploy` makes a model that only runs, `round_weights` one that 8 bits leave as it is.

User's view: docs/deploy.md.
"""

from .deployment import deploy
from .model import DeployedModel
from .rounding import round_weights

__all__ = ["DeployedModel", "deploy", "round_weights"]
