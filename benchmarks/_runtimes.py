"""Other runtimes for the anchors of inference.py: torch in bfloat16, ONNX Runtime, OpenVINO.

Each takes a model and its images and gives what runs it once. Graphs are made for this one size: the fastest way.
"""

import tempfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn

NEEDED = {"torch bf16": "torch", "onnxruntime": "onnxruntime", "openvino": "openvino"}


def missing(runtime: str) -> bool:
    """Whether a runtime is not installed."""
    return find_spec(NEEDED[runtime]) is None


def run_in(runtime: str, model: nn.Module, images: Tensor) -> Callable[[], object]:
    """What runs the model in a runtime, on as many threads as torch has."""
    if runtime == "torch bf16":
        half, x = model.to(torch.bfloat16), images.to(torch.bfloat16)
        return lambda: half(x)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        torch.onnx.export(model, (images,), str(path), dynamo=False, opset_version=17, input_names=["images"])
        content = path.read_bytes()
    return (_onnxruntime if runtime == "onnxruntime" else _openvino)(content, images)


def _onnxruntime(content: bytes, images: Tensor) -> Callable[[], object]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    feed = {"images": images.numpy()}
    return lambda: session.run(None, feed)


def _openvino(content: bytes, images: Tensor) -> Callable[[], object]:
    import io

    import openvino

    core = openvino.Core()
    core.set_property("CPU", {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "INFERENCE_PRECISION_HINT": "f32"})
    compiled = core.compile_model(core.read_model(io.BytesIO(content)), "CPU")
    feed = {"images": images.numpy()}
    return lambda: compiled(feed)
