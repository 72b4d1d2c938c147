"""Models as graphs for other runtimes: ONNX, OpenVINO and torch.export, whole or one time step at a time."""

from .export import Exported, export
from .formats import FORMATS, read_metadata
from .graphs import initial_state

__all__ = ["FORMATS", "Exported", "export", "initial_state", "read_metadata"]
