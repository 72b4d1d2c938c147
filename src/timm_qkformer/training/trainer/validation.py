"""`timm-qkformer validate`: accuracy of a model on labelled images or events."""

import argparse
import csv
import io
import json
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from ..._files import write_atomically
from .checkpoint import read_checkpoint, settings_in
from .datasets import check_classes, open_split
from .distributed import usable_device
from .evaluation import evaluate
from .loaders import create_eval_loader
from .network import autocast, build_model, compiling, data_config, load_weights
from .options import LOADED
from .rounding import rounded_weights
from .settings import need_data_dir, resolve

__all__ = ["resolve_validate", "validate"]

_FORMATS = (".json", ".csv")


def resolve_validate(given: Mapping[str, Any]) -> argparse.Namespace:
    """Settings of a validation: what was given, then the recipe's, then the checkpoint's, then the defaults.

    Raises:
        ValueError: If something does not fit, such as a checkpoint of another model.
        FileNotFoundError: If a file is not there.
    """
    known: dict[str, Any] = {}
    checkpoint = given.get("checkpoint")
    if checkpoint and not Path(checkpoint).is_file():
        raise FileNotFoundError(f"there is no checkpoint {checkpoint}")
    if checkpoint and Path(checkpoint).suffix not in (".safetensors", ".npz"):
        known = _settings_of(Path(checkpoint), given["model"])
    args = resolve(given, known)
    args.model = given["model"]
    args.checkpoint = checkpoint
    args.use_ema = not given.get("no_ema", False)
    args.val_split = given.get("split") or args.val_split
    args.data_dir = args.data_dir or args.data
    args.results_file = Path(given["results_file"]) if given.get("results_file") else None
    if args.results_file is not None:
        if args.results_file.suffix not in _FORMATS:
            raise ValueError(f"--results-file {args.results_file} needs to end in {' or '.join(_FORMATS)}")
        if args.results_file.exists():
            raise FileExistsError(f"--results-file {args.results_file} exists already; choose another name")
        if not args.results_file.parent.is_dir():
            raise FileNotFoundError(
                f"--results-file {args.results_file}: there is no folder {args.results_file.parent}"
            )
    need_data_dir(args)
    args.initial_checkpoint, args.pretrained_path = "", None
    args.distributed, args.rank, args.world_size = False, 0, 1
    # Weights from the model's tag, where no checkpoint is given.
    args.pretrained = args.pretrained or (checkpoint is None and (":" in args.model or "." in args.model))
    if checkpoint is not None:
        args.pretrained = False
    return args


def _settings_of(path: Path, model: str) -> dict[str, Any]:
    """How a trainer's checkpoint was trained: what of it says what the model is and sees."""
    try:
        content = read_checkpoint(path, mmap=True)
    except ValueError as error:
        if "not a checkpoint of a training run" in str(error):
            return {}  # weights alone
        raise
    arch = str(content.get("arch", model))
    if arch.partition(".")[0] != model.partition(".")[0]:
        raise ValueError(f"checkpoint {path} is of the model {arch}, not of {model}")
    ours = {*LOADED, "val_split"} - {"device", "data_dir", "workers", "batch_size", "dataset_download", "torchcompile"}
    return {key: value for key, value in settings_in(content).items() if key in ours}


def validate(args: argparse.Namespace, show: bool = True) -> dict[str, Any]:
    """Measure loss, top-1 and top-5 accuracy, speed and mean firing rate.

    Args:
        args: Settings, see `resolve_validate`.
        show: Show a progress bar.

    Returns:
        What was measured and on what, also written to `args.results_file`.

    Raises:
        OSError, ValueError: If something is not as it needs to be.
    """
    device = usable_device(args.device)
    model = build_model(args)
    if args.checkpoint:
        load_weights(model, args.checkpoint, args.model, use_ema=args.use_ema)
    dtype = getattr(torch, args.model_dtype) if args.model_dtype else None
    model.to(device=device, dtype=dtype)
    if args.channels_last:
        model.to(memory_format=torch.channels_last)
    config = data_config(args, model)
    time_steps = getattr(model, "time_steps", 1)
    dataset = open_split(args, args.val_split, False, tuple(config["input_size"]), time_steps)
    check_classes(dataset, args.num_classes, f"the split {args.val_split!r}")
    loader = create_eval_loader(args, dataset, config, f"the split {args.val_split!r}")
    runner: Any = model
    if args.torchcompile:
        with compiling(args):
            runner = torch.compile(model, backend=args.torchcompile, mode=args.torchcompile_mode)
    rounded = rounded_weights(model) if args.round_weights else nullcontext()
    with rounded, tqdm(total=len(dataset), unit="image", disable=None if show else True) as bar:
        measured = evaluate(runner, loader, device, autocast(args), dtype, args.channels_last, on_batch=bar.update)
    results = {
        "model": args.model,
        "checkpoint": args.checkpoint,
        "dataset": args.dataset,
        "split": args.val_split,
        "samples": measured.samples,
        "top1": measured.top1,
        "top5": measured.top5,
        "loss": measured.loss,
        "firing_rate": measured.firing_rate,
        "images_per_second": measured.samples_per_second,
        "batch_size": args.batch_size,
        "input_size": list(config["input_size"]),
        "time_steps": getattr(model, "time_steps", None),
        "parameters": sum(p.numel() for p in model.parameters()),
        "device": str(device),
    }
    if args.results_file is not None:
        write_atomically(args.results_file, _text(results, args.results_file.suffix))
    return results


def _text(results: Mapping[str, Any], suffix: str) -> str:
    if suffix == ".json":
        return json.dumps(results, indent=2) + "\n"
    flat = {k: "x".join(map(str, v)) if isinstance(v, list) else "" if v is None else v for k, v in results.items()}
    text = io.StringIO()
    writer = csv.DictWriter(text, list(flat), lineterminator="\n")
    writer.writeheader()
    writer.writerow(flat)
    return text.getvalue()
