"""Weights: convert upstream checkpoints to timm folders, verify their accuracy, publish them on the Hub."""

from .checkpoints import CheckpointError, read_checkpoint
from .convert import convert
from .publish import publish
from .verify import verify

__all__ = ["CheckpointError", "convert", "publish", "read_checkpoint", "verify"]
