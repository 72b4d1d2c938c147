"""Fast inference: `deploy` makes a model that only runs, `quantize_weights` one that 8 bits leave as it is.

User's view: docs/deploy.md.
"""

from .model import DeployedModel, deploy
from .weights import quantize_weights

__all__ = ["DeployedModel", "deploy", "quantize_weights"]
