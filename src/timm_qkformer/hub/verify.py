"""ImageNet-style evaluation of a converted checkpoint or a model's pretrained weights."""

import hashlib
import json
import re
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Optional, cast

import timm
import torch
from timm.data.config import resolve_model_data_config
from timm.data.imagenet_info import ImageNetInfo
from timm.data.loader import create_loader
from timm.data.readers import get_img_extensions
from timm.data.readers.reader_image_folder import find_images_and_targets
from torch import Tensor, nn
from tqdm import tqdm

from .._files import write_atomically
from ..data.images import open_image, readable
from ..data.sampling import draw
from ..layers import SpikingConv, SpikingSelfAttention

__all__ = ["coupled_layers", "find_samples", "verify"]

Sample = tuple[str, int]  # path and class index

_SYNSET = re.compile(r"(?<![A-Za-z0-9])n\d{8}(?!\d)")
_SAVE_EVERY = 10.0  # seconds between two writes of the progress file


@dataclass
class _Count:
    """What was counted so far with one kind of neurons."""

    top1: int = 0
    top5: int = 0
    seconds: float = 0.0


def verify(
    model: str,
    data: Path,
    *,
    neurons: str = "both",
    time_steps: Optional[int] = None,
    batch_size: int = 32,
    limit: Optional[int] = None,
    workers: int = 2,
    device: Optional[str] = None,
    progress: Optional[Path] = None,
    quiet: bool = False,
) -> list[dict[str, Any]]:
    """Measure top-1, top-5 and speed on labelled images, with the transform of the model's own config.

    With coupled neurons (the QKFormer release's way) a sample's answer depends on those before it in its batch; so
    the result depends on `batch_size` and on the images' order, which is that of their sorted paths.

    Args:
        model: Folder that `convert` wrote, or anything that `timm.create_model(..., pretrained=True)` takes.
        data: Folder with a folder of images for each class, or with images that have the synset in their name.
            Folders named by synset get ImageNet-1k's index, so a part of ImageNet will do; others are numbered in
            sorted order and there must be one for each of the model's classes.
        neurons: "per-sample", "coupled" or "both" (models without coupled neurons: per sample).
        time_steps: Time steps T. None: the model's.
        batch_size: Images in a batch.
        limit: Take the first so many images of a fixed random order of all. None: take all, sorted.
        workers: Processes that decode images; 0 for none.
        device: Where to run. None: CUDA if there is one, else CPU.
        progress: File to keep the counts in; a second call with the same arguments goes on from there.
        quiet: Show no progress bar.

    Returns:
        One dict for each kind of neurons with model, batch_coupled, time_steps, images, top1 and top5 in percent,
        images_per_second (of the forward pass alone), input_size, batch_size and device.

    Raises:
        ValueError: For an argument outside its range, images without a known class or a broken image.
    """
    _check_arguments(neurons, batch_size, limit, workers)
    on = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    net: Any = _load(model, time_steps).to(on).eval()
    samples = draw(find_samples(data, net.num_classes), limit)
    config = resolve_model_data_config(net)
    modes = _modes(net, neurons)
    key = _fingerprint(net, samples, config, batch_size, sorted(modes))
    done, counts = _read_progress(progress, key, modes)

    loader = create_loader(
        cast(Any, _Images(samples[done:], net.in_chans)),
        input_size=config["input_size"],
        batch_size=batch_size,
        interpolation=config["interpolation"],
        mean=config["mean"],
        std=config["std"],
        crop_pct=config["crop_pct"],
        crop_mode=config["crop_mode"],
        num_workers=workers,
        persistent_workers=False,
        use_prefetcher=False,
        device=on,
    )
    saved = time.monotonic()
    with tqdm(total=len(samples), initial=done, unit="img", disable=quiet or None) as bar:
        for images, targets in readable(loader) if done < len(samples) else ():
            images, targets = images.to(on), targets.to(on)
            for name, coupled in modes.items():
                _count(net, coupled, images, targets, counts[name])
            done += len(targets)
            bar.update(len(targets))
            bar.set_postfix({name: f"{100 * count.top1 / done:.2f} %" for name, count in counts.items()})
            if progress is not None and (time.monotonic() - saved > _SAVE_EVERY or done == len(samples)):
                _write_progress(progress, key, done, counts)
                saved = time.monotonic()
    return [
        {
            "model": model,
            "batch_coupled": modes[name],
            "time_steps": net.time_steps,
            "images": done,
            "top1": 100 * count.top1 / done,
            "top5": 100 * count.top5 / done,
            "images_per_second": done / count.seconds,
            "input_size": list(config["input_size"]),
            "batch_size": batch_size,
            "device": str(on),
        }
        for name, count in counts.items()
    ]


def _check_arguments(neurons: str, batch_size: int, limit: Optional[int], workers: int) -> None:
    if neurons not in ("both", "per-sample", "coupled"):
        raise ValueError(f"neurons={neurons!r} is unknown, choose one of both, per-sample, coupled")
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be at least 1")
    if limit is not None and limit < 1:
        raise ValueError(f"limit={limit} must be at least 1")
    if workers < 0:
        raise ValueError(f"workers={workers} must not be negative")


def _load(model: str, time_steps: Optional[int]) -> nn.Module:
    if (Path(model) / "config.json").is_file():
        name = f"local-dir:{model}"
    elif ":" in model or timm.is_model(model.split(".")[0]):
        name = model
    else:
        raise ValueError(f"{model} is neither a folder with a config.json nor a model that timm knows")
    net: nn.Module = timm.create_model(name, pretrained=True, time_steps=time_steps)
    return net


def find_samples(data: Path, num_classes: int) -> list[Sample]:
    """Images below `data` with their class index, sorted by path; see `verify` for the two layouts.

    Raises:
        ValueError: If there are no images, or their classes cannot be told.
    """
    if not data.is_dir():
        raise ValueError(f"data={str(data)!r} is not a folder")
    for split in ("val", "validation"):
        if (data / split).is_dir():
            data = data / split
            break
    synsets = ImageNetInfo("imagenet-1k").label_names()
    images, classes = find_images_and_targets(str(data))
    if not images:
        extensions = ", ".join(get_img_extensions())
        raise ValueError(f"data={str(data)!r} has no images below it ({extensions})")
    if set(classes) == {""}:
        return _by_file_name([path for path, _ in images], {name: i for i, name in enumerate(synsets)}, num_classes)
    if "" in classes:
        raise ValueError(f"data={str(data)!r} has images both beside and inside its class folders")
    if set(classes) <= set(synsets) and num_classes == len(synsets):
        classes = {name: i for i, name in enumerate(synsets)}
        return find_images_and_targets(str(data), class_to_idx=classes)[0]
    if len(classes) != num_classes:
        raise ValueError(
            f"data={str(data)!r} has {len(classes)} class folders ({', '.join(sorted(classes)[:3])}, ...) and the "
            f"model {num_classes} classes; name the folders by ImageNet-1k synset or have one for each class"
        )
    return images


def _by_file_name(paths: list[str], classes: dict[str, int], num_classes: int) -> list[Sample]:
    if num_classes != len(classes):
        raise ValueError(f"images without class folders are for ImageNet-1k, and the model has {num_classes} classes")
    samples = []
    for path in paths:
        found = _SYNSET.search(Path(path).stem)
        if found is None or found[0] not in classes:
            raise ValueError(f"{path}: no class folder, and no ImageNet-1k synset in the file's name")
        samples.append((path, classes[found[0]]))
    return samples


class _Images(torch.utils.data.Dataset[tuple[Any, int]]):
    """Samples as images; timm's loader sets `transform`. timm's own dataset skips broken images, this one says so."""

    def __init__(self, samples: list[Sample], channels: int) -> None:
        self.samples = samples
        self.mode = "L" if channels == 1 else "RGB"
        self.transform: Any = None

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        path, target = self.samples[index]
        return self.transform(open_image(path, self.mode)), target


def coupled_layers(net: nn.Module) -> list[SpikingConv]:
    """Layers whose neurons the QKFormer release couples: with membrane shortcuts there are none."""
    projections = [module.proj for module in net.modules() if isinstance(module, SpikingSelfAttention)]
    return [layer for layer in projections if not isinstance(layer.neuron, nn.Identity)]


def _modes(net: nn.Module, neurons: str) -> dict[str, bool]:
    """Kinds of neurons to measure, by name, and whether they are coupled."""
    modes = {"per-sample": False, "coupled": True}
    if not coupled_layers(net):
        if neurons == "coupled":
            raise ValueError(f"neurons='coupled': {type(net).__name__} has no coupled neurons")
        return {"per-sample": False}
    return modes if neurons == "both" else {neurons: modes[neurons]}


@torch.inference_mode()
def _count(net: nn.Module, coupled: bool, images: Tensor, targets: Tensor, count: _Count) -> None:
    for layer in coupled_layers(net):
        layer.batch_coupled = coupled
    start = time.perf_counter()
    logits = net(images)
    ranks = logits.topk(min(5, logits.shape[1])).indices.cpu()  # waits for the device
    count.seconds += time.perf_counter() - start
    hits = ranks == targets.cpu().unsqueeze(1)
    count.top1 += int(hits[:, 0].sum())
    count.top5 += int(hits.any(1).sum())


def _fingerprint(
    net: nn.Module, samples: list[Sample], config: dict[str, Any], batch_size: int, modes: list[str]
) -> str:
    """Identifies weights, images and settings, so that counts of one run are never added to another's."""
    digest = hashlib.sha256()
    for name, tensor in net.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    digest.update(json.dumps([samples, config, net.time_steps, batch_size, modes], sort_keys=True).encode())
    return digest.hexdigest()


def _read_progress(path: Optional[Path], key: str, modes: dict[str, bool]) -> tuple[int, dict[str, _Count]]:
    if path is None or not path.exists():
        return 0, {name: _Count() for name in modes}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        found, done = content["key"], int(content["done"])
        counts = {name: _Count(**content["counts"][name]) for name in modes}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"progress={str(path)!r} is not a progress file; delete it or name another") from error
    if found != key:
        raise ValueError(
            f"progress={str(path)!r} belongs to a run with other weights, images or settings; delete it or name another"
        )
    return done, counts


def _write_progress(path: Path, key: str, done: int, counts: dict[str, _Count]) -> None:
    content = {"key": key, "done": done, "counts": {name: asdict(count) for name, count in counts.items()}}
    write_atomically(path, json.dumps(content))
