"""Weights: convert upstream checkpoints to timm folders, verify their accuracy, publish them on the Hub."""

from .checkpoints import Checkpoint, CheckpointError, read_checkpoint
from .convert import Conversion, convert
from .publish import publish
from .recognise import Recognised, recognise
from .verify import verify

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "Conversion",
    "Recognised",
    "convert",
    "publish",
    "read_checkpoint",
    "recognise",
    "verify",
]
