"""`timm-qkformer reproduce`: the paper's tables and figures, published and measured side by side."""

from .page import write_page
from .results import Run, read_runs
from .subject import Subject, photographs

__all__ = ["Run", "Subject", "photographs", "read_runs", "write_page"]
