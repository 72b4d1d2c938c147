"""Writing graphs in three formats, reading what stands in them, and running them.

OpenVINO and ONNX are written by torch's TorchScript-based exporter: it leaves every dimension that has a name open,
in seconds. The newer one, `torch.onnx.export(model, ..., dynamo=True)`, gives the same answers and takes minutes.

A neuron compares its potential with a threshold, so numbers that are rounded to half precision change spikes, and with
them all that follows: OpenVINO is told to keep weights in float32 and to compute in it.
"""

import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from .graphs import Graph

Array = NDArray[Any]
Run = Callable[[Mapping[str, Array]], list[Array]]  # inputs by name to outputs in order

_KEY = "timm_qkformer"  # of the metadata, a JSON text
_IN_FLOAT32 = {"INFERENCE_PRECISION_HINT": "f32"}


class Format(NamedTuple):
    """A file format.

    Attributes:
        suffix: Of its file.
        modules: What it needs to be installed.
        write: Writes a graph with its metadata to a path.
        read: The metadata, as text, of a file.
        load: A function that runs a file.
        also: Suffixes of files beside it.
    """

    suffix: str
    modules: tuple[str, ...]
    write: Callable[[Graph, str, Path], None]
    read: Callable[[Path], str | None]
    load: Callable[[Path, Sequence[str]], Run]
    also: tuple[str, ...] = ()


def _write_onnx(graph: Graph, metadata: str, path: Path) -> None:
    import onnx

    axes = {
        port.name: {i: dim for i, dim in enumerate(port.dims) if isinstance(dim, str)}
        for port in (*graph.inputs, *graph.outputs)
    }
    with warnings.catch_warnings():
        # That the exporter is the older one, which this module says why it takes.
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        warnings.filterwarnings("ignore", category=FutureWarning)
        torch.onnx.export(
            graph.module,
            graph.example,
            str(path),
            dynamo=False,
            input_names=[port.name for port in graph.inputs],
            output_names=[port.name for port in graph.outputs],
            dynamic_axes=axes,
        )
    model = onnx.load(path)
    entry = model.metadata_props.add()
    entry.key, entry.value = _KEY, metadata
    onnx.save(model, path)


def _read_onnx(path: Path) -> str | None:
    import onnx

    props = onnx.load(path, load_external_data=False).metadata_props
    return next((entry.value for entry in props if entry.key == _KEY), None)


def _load_onnx(path: Path, names: Sequence[str]) -> Run:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda inputs: session.run(None, dict(inputs))


def _write_openvino(graph: Graph, metadata: str, path: Path) -> None:
    import openvino

    onnx_file = path.with_suffix(".onnx")
    _write_onnx(graph, metadata, onnx_file)
    model = openvino.convert_model(onnx_file)
    onnx_file.unlink()
    model.set_rt_info(metadata, [_KEY, "metadata"])
    openvino.save_model(model, path, compress_to_fp16=False)


def _read_openvino(path: Path) -> str | None:
    import openvino

    model = openvino.Core().read_model(path)
    place = [_KEY, "metadata"]
    return str(model.get_rt_info(place).value) if model.has_rt_info(place) else None


def _load_openvino(path: Path, names: Sequence[str]) -> Run:
    import openvino

    compiled = openvino.Core().compile_model(path, "CPU", _IN_FLOAT32)

    def run(inputs: Mapping[str, Array]) -> list[Array]:
        found = compiled(dict(inputs))
        return [found[output].copy() for output in compiled.outputs]

    return run


def _write_torch(graph: Graph, metadata: str, path: Path) -> None:
    auto = torch.export.Dim.AUTO
    shapes = tuple({i: auto for i, dim in enumerate(port.dims) if isinstance(dim, str)} for port in graph.inputs)
    arguments: Any = shapes if len(shapes) == 1 else (shapes[0], shapes[1:])
    program = torch.export.export(graph.module, graph.example, dynamic_shapes=arguments)
    torch.export.save(program, path, extra_files={f"{_KEY}.json": metadata})


def _read_torch(path: Path) -> str | None:
    found: dict[str, Any] = {f"{_KEY}.json": ""}
    torch.export.load(path, extra_files=found)
    text = found[f"{_KEY}.json"]
    return (text.decode() if isinstance(text, bytes) else str(text)) or None


def _load_torch(path: Path, names: Sequence[str]) -> Run:
    module = torch.export.load(path).module()

    def run(inputs: Mapping[str, Array]) -> list[Array]:
        found = module(*(torch.from_numpy(np.asarray(inputs[name])) for name in names))
        outputs = found if isinstance(found, (tuple, list)) else (found,)
        return [output.detach().numpy() for output in outputs]

    return run


FORMATS: dict[str, Format] = {
    "onnx": Format(".onnx", ("onnx", "onnxruntime"), _write_onnx, _read_onnx, _load_onnx),
    "openvino": Format(".xml", ("onnx", "openvino"), _write_openvino, _read_openvino, _load_openvino, (".bin",)),
    "torch": Format(".pt2", (), _write_torch, _read_torch, _load_torch),
}


def read_metadata(path: str | Path) -> dict[str, Any]:
    """What `export` wrote into a file: model, form, time steps, classes, preprocessing, state and exit rule.

    Raises:
        ValueError: For a file of another suffix, or that `export` did not write.
    """
    path = Path(path)
    known = {form.suffix: form for form in FORMATS.values()}
    if path.suffix not in known:
        raise ValueError(f"{path} is none of {', '.join(known)}")
    text = known[path.suffix].read(path)
    if text is None:
        raise ValueError(f"{path} has no metadata of this package: it was not written by timm_qkformer.export")
    metadata: dict[str, Any] = json.loads(text)
    return metadata
