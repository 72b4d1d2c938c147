"""Fast inference: `deploy` makes a model that only runs. User's view: docs/deploy.md."""

from .deployment import deploy
from .model import DeployedModel

__all__ = ["DeployedModel", "deploy"]
