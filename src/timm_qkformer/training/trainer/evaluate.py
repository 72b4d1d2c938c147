"""One pass over the validation data, and `timm-qkformer validate`: accuracy of a model on labelled images or events."""

import json
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from timm.task import ClassificationEvaluator, evaluation_sample_limit
from timm.utils import unwrap_model
from torch import nn
from torch.utils.data import Subset

from ...analysis import firing_rates
from ...data.sampling import draw
from ...devices import usable_device
from ...execution.memory import keep_freed_memory
from ...files import write_atomically
from ...hub.checkpoints import CheckpointError, read_content
from ...hub.evaluate import Evaluation, classify_batches, report
from ...hub.folder import check_folder
from ...neurons import SpikingNeuron
from ...progress import Bar
from .checkpoint import settings_in
from .config import merge_settings, require_data_dir
from .data import check_classes, create_eval_loader, open_split
from .distributed import Processes
from .log import csv_text
from .network import (
    autocast,
    build_model,
    compiling,
    data_config,
    forward_weights,
    load_weights,
    model_dtype,
    to_device,
)
from .settings import LOADED, Settings

_logger = logging.getLogger(__name__)

_RATE_SAMPLES = 32  # the firing rate is that of so many samples: one small forward pass
_FORMATS = (".json", ".csv")
# What a validation does not read from a checkpoint, though `LOADED` has it: where it runs.
_OF_MACHINE = {"device", "data_dir", "workers", "batch_size", "dataset_download", "torchcompile"}


@torch.inference_mode()
def evaluate(
    settings: Settings,
    model: nn.Module,
    batches: Any,
    processes: Processes,
    on_batch: Callable[[int], object] | None = None,
) -> Evaluation:
    """Classify every sample once, in eval mode, over all processes; `on_batch` is called with each batch's size."""
    model.eval()
    device, context = processes.device, autocast(settings, processes.device)
    evaluator = ClassificationEvaluator(device=device, max_samples=evaluation_sample_limit(batches))
    rate = None
    start = time.perf_counter()
    counted = classify_batches(
        [(model, evaluator)], batches, device, context, model_dtype(settings), settings.channels_last
    )
    for index, x in enumerate(counted):
        inner = unwrap_model(model)
        if index == 0 and any(isinstance(module, SpikingNeuron) for module in inner.modules()):
            with context():
                rate = firing_rates(inner, x[:_RATE_SAMPLES]).mean
        if on_batch is not None:
            on_batch(len(x))
    metrics = evaluator.compute(processes.distributed)
    samples = evaluator.counts[0].clone()
    if processes.distributed:
        torch.distributed.all_reduce(samples)
    seconds = max(time.perf_counter() - start, 1e-9)
    return Evaluation(**metrics, samples=int(samples), samples_per_second=int(samples) / seconds, firing_rate=rate)


@dataclass(frozen=True, kw_only=True)
class ValidationSettings(Settings):
    """Settings of a validation."""

    checkpoint: str | None = None  # where the weights are; None for those of the model's name
    use_ema: bool = True  # take the moving average of the weights, if the checkpoint has it
    results_file: Path | None = None  # new .json or .csv file for the results


def resolve_validate(given: Mapping[str, Any]) -> ValidationSettings:
    """Settings of a validation: what was given, then the recipe's, then the checkpoint's, then the defaults.

    Arguments of the model are merged one by one; a warning names those of the checkpoint that are replaced. A folder
    that `convert` wrote says itself what it is shown.

    ValueError if something does not fit, such as a checkpoint of another model; OSError if a file is not there, or the
    results' is.
    """
    model, checkpoint = given["model"], given.get("checkpoint")
    if model.startswith("local-dir:") or (Path(model) / "config.json").is_file():
        model = f"local-dir:{model.removeprefix('local-dir:')}"
    known = _settings_of(Path(checkpoint), model) if checkpoint else _settings_of_folder(model)
    values = merge_settings({**given, "model": model}, known)
    values["model_kwargs"] = _merged_kwargs(values.get("model_kwargs") or {}, known, given.get("time_steps"))
    values |= {"initial_checkpoint": "", "pretrained_path": None}
    values["val_split"] = given.get("split") or values.get("val_split", Settings.val_split)
    # Weights from the model's tag, if no checkpoint is given.
    values["pretrained"] = not checkpoint and (values.get("pretrained", False) or ":" in model or "." in model)
    results = Path(given["results_file"]) if given.get("results_file") else None
    if results is not None:
        if results.suffix not in _FORMATS:
            raise ValueError(f"--results-file {results} needs to end in {' or '.join(_FORMATS)}")
        if results.exists():
            raise FileExistsError(f"--results-file {results} exists already; choose another name")
        if not results.parent.is_dir():
            raise FileNotFoundError(f"--results-file {results}: there is no folder {results.parent}")
    settings = ValidationSettings(
        **values, checkpoint=checkpoint, use_ema=not given.get("no_ema", False), results_file=results
    )
    require_data_dir(settings)
    return settings


def _merged_kwargs(given: Mapping[str, Any], known: Mapping[str, Any], time_steps: int | None) -> dict[str, Any]:
    """The model's arguments: those of the checkpoint, and those that were given instead or besides."""
    asked = dict(given) if given is not known.get("model_kwargs") else {}
    if time_steps is not None:
        if asked.get("time_steps", time_steps) != time_steps:
            raise ValueError(f"--time-steps {time_steps} and --model-kwargs time_steps={asked['time_steps']} disagree")
        asked["time_steps"] = time_steps
    stated: Mapping[str, Any] = known.get("model_kwargs") or {}
    for name in stated.keys() & asked.keys():
        if stated[name] != asked[name]:
            _logger.warning("model_kwargs: %s=%r replaces the checkpoint's %r", name, asked[name], stated[name])
    return {**stated, **asked}


def _settings_of_folder(model: str) -> dict[str, Any]:
    """How a converted folder's model sees images and clips. {} for other names of models."""
    if not model.startswith("local-dir:"):
        return {}
    config = check_folder(Path(model.removeprefix("local-dir:")))
    cfg: dict[str, Any] = config["pretrained_cfg"]
    size = cfg.get("input_size") or [3, 224, 224]
    channels = (config.get("model_args") or {}).get("in_chans", size[0])
    own = {name: cfg[name] for name in ("mean", "std") if len(cfg.get(name) or ()) in (1, channels)}
    return {"in_chans": channels, "input_size": [channels, *size[1:]], **own}


def _settings_of(path: Path, model: str) -> dict[str, Any]:
    """How a trainer's checkpoint was trained: what of it says what the model is and sees. {} for weights alone."""
    if not path.is_file():
        raise CheckpointError(f"{path}: there is no such file")
    content = {} if path.suffix == ".npz" else read_content(path)
    if not isinstance(content, dict) or "state_dict" not in content:
        return {}
    arch = str(content.get("arch", model))
    if arch.partition(".")[0] != model.partition(".")[0]:
        raise ValueError(f"checkpoint {path} is of the model {arch}, not of {model}")
    wanted = {*LOADED, "val_split"} - _OF_MACHINE
    return {key: value for key, value in settings_in(content).items() if key in wanted}


def validate(settings: ValidationSettings, show: bool = True) -> dict[str, Any]:
    """Measure loss, top-1 and top-5 accuracy, speed and mean firing rate; also written to `settings.results_file`.

    OSError or ValueError if something is not as it needs to be.
    """
    processes = Processes(usable_device(settings.device))
    if processes.device.type == "cpu":
        keep_freed_memory()
    model = load_measured(settings, processes)
    config = data_config(settings, model)
    split = settings.val_split
    dataset, loader = open_measured(settings, processes, model, split)
    runner: Any = model
    if settings.torchcompile:
        with compiling(settings):
            runner = torch.compile(model, backend=settings.torchcompile, mode=settings.torchcompile_mode)
    bar = Bar(total=len(dataset), unit="image", disable=None if show else True)
    with forward_weights(settings, model), bar:
        measured = evaluate(settings, runner, loader, processes, on_batch=bar.update)
    facts = {"model": settings.model, "checkpoint": settings.checkpoint, "dataset": settings.dataset, "split": split}
    results = report(measured, model, config, settings.batch_size, processes.device, **facts)
    if settings.results_file is not None:
        write_atomically(settings.results_file, _text(results, settings.results_file.suffix))
    return results


def load_measured(settings: ValidationSettings, processes: Processes) -> Any:
    """The model of a validation, with its weights, on its device."""
    model = build_model(settings)
    if settings.checkpoint:
        load_weights(model, settings.checkpoint, settings.model, use_ema=settings.use_ema)
    to_device(settings, model, processes.device)
    return model


def open_measured(
    settings: ValidationSettings, processes: Processes, model: Any, split: str, limit: int | None = None
) -> tuple[Any, Any]:
    """A split's samples, all or `limit` of them drawn at random, as a model takes them: data set and loader."""
    config, where = data_config(settings, model), f"the split {split!r}"
    dataset = open_split(settings, split, False, tuple(config["input_size"]), getattr(model, "time_steps", 1))
    check_classes(dataset, settings.num_classes or model.num_classes, where)
    if limit is not None and limit < len(dataset):
        dataset = _Drawn(dataset, limit)
    return dataset, create_eval_loader(settings, processes, dataset, config, where)


class _Drawn(Subset[Any]):
    """Some samples of a data set, always the same; the loader sets its transform."""

    def __init__(self, dataset: Any, limit: int) -> None:
        super().__init__(dataset, draw(range(len(dataset)), limit))

    @property
    def transform(self) -> Any:
        return self.dataset.transform  # type: ignore[attr-defined]

    @transform.setter
    def transform(self, transform: Any) -> None:
        self.dataset.transform = transform  # type: ignore[attr-defined]


def _text(results: Mapping[str, Any], suffix: str) -> str:
    if suffix == ".json":
        return json.dumps(results, indent=2) + "\n"
    return csv_text([{k: "x".join(map(str, v)) if isinstance(v, list) else v for k, v in results.items()}])
