"""What a checkpoint records of a run's data: how samples are made and what they are, so that others can do the same."""

import hashlib
import os
import zlib
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from timm.data.readers import get_img_extensions

from .settings import Settings

_READ = 64  # files whose content is compared, evenly over the data set


def data_facts(settings: Settings, config: Mapping[str, Any], dataset: Any, time_steps: int) -> dict[str, Any]:
    """All that a validation sample is made with, in one place: the checkpoint's entry trainer.data.

    Args:
        settings: Of the run.
        config: timm's data config of the model.
        dataset: Of the validation, or the training.
        time_steps: T of the model.

    Returns:
        `input_size` (C, H, W), `mean`, `std`, and for images `crop_pct`, `crop_mode`, `interpolation`; for events
        `events`, with the arguments of `create_event_dataset`.
    """
    if not settings.is_events:
        keys = ("input_size", "mean", "std", "crop_pct", "crop_mode", "interpolation")
        return {key: _plain(config[key]) for key in keys if key in config}
    channels, spec = settings.channels, getattr(dataset, "spec", None)
    size: Any = settings.input_size[1:] if settings.input_size else getattr(spec, "size", None)
    camera: Any = settings.event_sensor_size or getattr(dataset, "sensor_size", None)
    return {
        "input_size": [channels, *(size or camera or config["input_size"][1:])],
        "mean": _channels(settings.mean or [0.0], channels),
        "std": _channels(settings.std or [1.0], channels),
        "events": {
            "name": settings.dataset.partition("/")[2],
            "time_steps": time_steps,
            "split_by": settings.event_split_by,
            "size": _plain(size),
            "sensor_size": _plain(camera),
        },
    }


def _channels(values: list[float], channels: int) -> list[float]:
    return [float(v) for v in values] * (channels if len(values) == 1 else 1)


def _plain(value: Any) -> Any:
    return [_plain(v) for v in value] if isinstance(value, (list, tuple)) else value


def fingerprint(dataset: Any) -> str:
    """Stands for a data set's files (names below their folder, the content of 64) and labels, in their order.

    Moving the whole folder does not change it.
    """
    samples: list[Any] = list(
        getattr(getattr(dataset, "reader", None), "samples", None) or getattr(dataset, "recordings", None) or ()
    )
    digest = hashlib.sha256(str(len(dataset)).encode())
    paths = [str(file) for file, _ in samples if isinstance(file, (str, Path))]
    root = os.path.commonpath([os.path.dirname(path) for path in paths]) if paths else ""
    every = max(1, len(paths) // _READ)
    for index, (file, target) in enumerate(samples):
        name = str(file)[len(root) :] if paths else ""
        digest.update(f"{name}\t{target}\n".encode(errors="surrogateescape"))
        if paths and index % every == 0:
            try:
                digest.update(str(zlib.crc32(Path(file).read_bytes())).encode())
            except OSError as error:  # which the run will name, or skip
                digest.update(type(error).__name__.encode())
    return digest.hexdigest()[:16]


def differences(old: Mapping[str, Any], new: Mapping[str, Any], device: torch.device) -> list[str]:
    """What makes a resumed run another one, besides its settings, from the entries that `run_facts` gave."""
    notes = []
    if "files" in old and old["files"] != new["files"]:
        notes.append("the files or labels to train on are not those of the checkpoint: replaced, renamed or more")
    threads = old.get("threads")
    if device.type == "cpu" and threads is not None and threads != new["threads"]:
        notes.append(f"{new['threads']} threads instead of {threads}: sums in another order")
    return notes


def left_out(folder: Path, used: int) -> str:
    """How many files of an image folder are not read for their kind, and which kinds; "" if all are."""
    read, known = set(get_img_extensions()), set(Image.registered_extensions())
    others: Counter[str] = Counter()
    for _, folders, files in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        kinds = (os.path.splitext(name)[1].lower() for name in files)
        others.update(kind for kind in kinds if kind in known and kind not in read)
    if not others:
        return ""
    found = ", ".join(f"{number} {kind}" for kind, number in others.most_common(5))
    reads = ", ".join(sorted(read))
    return f"{folder}: {used + others.total()} pictures, {used} used; left out are {found} (read: {reads})"


def contention(processes: int, device: torch.device) -> str:
    """A hint where more threads compute than there are cores for, which each wait for the others; "" if not."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = torch.get_num_threads()
    if device.type != "cpu" or threads * processes < 2:
        return ""
    others = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    if threads * processes + others < cores + 0.7:
        return ""
    busy = f" and others keep {others:.1f} busy" if others >= 0.7 else ""
    fewer = max(1, int((cores - others) / processes + 0.3))
    if fewer >= threads:
        return ""
    return (
        f"hint: {processes * threads} threads compute on {cores} cores{busy}; where threads wait for each other, "
        f"OMP_NUM_THREADS={fewer} is faster"
    )
