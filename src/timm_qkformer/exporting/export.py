"""Exporting a model: a file that appears once it answers as the model does, and how well it does."""

import copy
import json
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timm.data.config import resolve_model_data_config
from torch import Tensor

from ..analysis.inputs import noise_data
from ..models import SpikingTransformer
from ..streaming.exits import calibrated_rule
from .formats import FORMATS, Format, Run
from .graphs import Graph, clip_graph, initial_state, step_graph, takes_clips

SAMPLES = 16  # of noise, where there are no data


@dataclass(frozen=True)
class Exported:
    """What was written, and how it compares with the model on the samples that were tried."""

    path: Path  # the file
    samples: int  # tried
    same_top1: int  # of them
    largest_difference: float  # between logits
    metadata: dict[str, Any] = field(repr=False)  # what stands in the file

    def __str__(self) -> str:
        share = 100.0 * self.same_top1 / self.samples
        return (
            f"{self.path}: {self.same_top1} of {self.samples} samples with the model's top-1 ({share:.2f} %), "
            f"largest difference of logits {self.largest_difference:.2g}"
        )


def export(
    model: Any,
    output: str | Path,
    format: str = "onnx",
    *,
    step: bool = False,
    data: Iterable[Tensor] | None = None,
    force: bool = False,
    name: str | None = None,
) -> Exported:
    """Write a model as a graph for another runtime, in float32, for any batch and image size.

    The graph is compared with the model in the runtime itself, for an input of another batch and size, too, before the
    file appears under its name. It runs dense; what silent neurons cost is nothing only with `deploy`.

    Args:
        model: A model of this package, not a deployed one. It is left as it was.
        output: The file: .onnx, .xml (and .bin beside it), or .pt2.
        format: "onnx", "openvino" or "torch" (torch.export, which takes minutes).
        step: Write one time step, with the state as inputs and outputs. Else the whole input is one: an image, shown
            for `model.time_steps`, or for models of two channels an event clip of so many steps.
        data: Inputs as the model takes them, batches of images [B, C, H, W] or clips [B, T, C, H, W], to compare on.
            None: noise.
        force: Replace files that exist.
        name: What the metadata call the model.

    Raises:
        ValueError: For another model, format or suffix; a model that has no first step like the others, with `step`;
            a note of an exit rule in its config that is none.
        FileExistsError: If there is such a file.
        ModuleNotFoundError: If the runtime is not installed: pip install 'timm-qkformer[export]'.
        RuntimeError: If the graph does not answer as the model does.
    """
    path = Path(output)
    target = _check(model, path, format, force)
    plain: SpikingTransformer = copy.deepcopy(model).cpu().float().eval()
    config = resolve_model_data_config(plain)
    if config["input_size"][0] != plain.in_chans:
        config = {**config, "input_size": (plain.in_chans, *config["input_size"][1:])}
    with torch.no_grad(), tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        graph = (step_graph if step else clip_graph)(plain, config["input_size"][1:])
        metadata = _metadata(plain, config, graph, step, name)
        temporary = Path(folder) / path.name
        target.write(graph, json.dumps(metadata), temporary)
        run = target.load(temporary, [port.name for port in graph.inputs])
        _check_other_sizes(plain, run, graph, metadata)
        result = _compare(plain, run, noise_data(plain, SAMPLES)[1] if data is None else data, metadata)
        for suffix in (*target.also, target.suffix):  # the file that names the others comes last
            written = temporary.with_suffix(suffix)
            written.chmod(0o644)
            written.replace(path.with_suffix(suffix))
    return Exported(path, *result, metadata)


def _check(model: Any, path: Path, format: str, force: bool) -> Format:
    if not isinstance(model, SpikingTransformer):
        raise ValueError(
            f"model is a {type(model).__name__}: give a model of this package as timm creates it; of a deployed one, "
            "export the original"
        )
    if any(getattr(part, "batch_coupled", False) for part in model.modules()):
        raise ValueError("batch_coupled=True: samples that influence each other have no graph for any batch")
    if format not in FORMATS:
        raise ValueError(f"format={format!r} is unknown, choose one of {list(FORMATS)}")
    target = FORMATS[format]
    if path.suffix != target.suffix:
        raise ValueError(f"output={str(path)!r}: a file of format {format!r} ends in {target.suffix}")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path.parent} is no folder: make it first")
    for suffix in (target.suffix, *target.also):
        if path.with_suffix(suffix).exists() and not force:
            raise FileExistsError(
                f"{path.with_suffix(suffix)} exists already: choose another name, or force=True (--force)"
            )
    for module in target.modules:
        import_module(module)
    return target


def _metadata(model: Any, config: dict[str, Any], graph: Graph, step: bool, name: str | None) -> dict[str, Any]:
    from .. import __version__

    cfg = getattr(model, "pretrained_cfg", None) or {}
    rule = calibrated_rule(model)
    ports = [port._asdict() for port in graph.state]
    return {
        "package": f"timm-qkformer {__version__}",
        "model": name or cfg.get("architecture") or type(model).__name__,
        "form": "step" if step else "clip",
        "time_steps": model.time_steps,
        "input": {**graph.inputs[0]._asdict(), "dims": list(graph.inputs[0].dims)},
        "num_classes": model.num_classes,
        "label_names": list(cfg.get("label_names") or []),
        "preprocessing": {key: list(value) if isinstance(value, tuple) else value for key, value in config.items()},
        "exit": None if rule is None else asdict(rule),
        "state": [{**port, "dims": list(port["dims"])} for port in ports],
    }


def _run(run: Run, x: Tensor, metadata: dict[str, Any]) -> Tensor:
    """Logits of a graph for images or clips."""
    if metadata["form"] == "clip":
        return torch.from_numpy(run({metadata["input"]["name"]: x.numpy()})[0])
    frames = x.unbind(1) if x.dim() == 5 else [x] * metadata["time_steps"]
    state = initial_state(metadata, len(x), *x.shape[-2:])
    logits = np.empty(0)
    for frame in frames:
        logits, *after = run({"frame": np.ascontiguousarray(frame.numpy()), **state})
        state = dict(zip(state, after, strict=True))
    return torch.from_numpy(logits)


def _check_other_sizes(model: SpikingTransformer, run: Run, graph: Graph, metadata: dict[str, Any]) -> None:
    """An input of another batch and, where the graph takes any, of another size."""
    *_, H, W = graph.example[0].shape
    if "height" in graph.inputs[0].dims:
        H, W = H + model.stem.min_size, W + 2 * model.stem.min_size
    clip = [model.time_steps] if takes_clips(model) else []
    x = torch.randn(3, *clip, model.in_chans, H, W)
    found, expected = _run(run, x, metadata), model(x)
    if found.shape != expected.shape or not bool(found.isfinite().all()):
        raise RuntimeError(f"the graph's logits {list(found.shape)} of {list(x.shape)} are not the model's")


def _compare(
    model: SpikingTransformer, run: Run, data: Iterable[Tensor], metadata: dict[str, Any]
) -> tuple[int, int, float]:
    """Samples, how many have the same top-1, and the largest difference of logits."""
    samples, same, largest = 0, 0, 0.0
    for x in _batches(data):
        expected, found = model(x), _run(run, x, metadata)
        samples += len(x)
        same += int((expected.argmax(1) == found.argmax(1)).sum())
        largest = max(largest, float((expected - found).abs().max()))
    if samples == 0:
        raise ValueError("data has no samples")
    return samples, same, largest


def _batches(data: Iterable[Tensor], size: int = 16) -> Iterable[Tensor]:
    """Inputs of any batch, put together to batches where their shapes allow it."""
    waiting: list[Tensor] = []
    for x in data:
        if waiting and (x.shape[1:] != waiting[0].shape[1:] or sum(map(len, waiting)) >= size):
            yield _joined(waiting)
            waiting = []
        waiting.append(x.detach().cpu().float())
    if waiting:
        yield _joined(waiting)


def _joined(waiting: Sequence[Tensor]) -> Tensor:
    return torch.cat(list(waiting))
