"""ImageNet-style evaluation of a converted checkpoint or a model's pretrained weights."""

import hashlib
import inspect
import json
import re
import time
from pathlib import Path
from typing import Any, cast

import timm
import torch
from timm.data.config import resolve_model_data_config
from timm.data.imagenet_info import ImageNetInfo
from timm.data.loader import create_loader
from timm.data.readers import get_img_extensions
from timm.data.readers.reader_image_folder import find_images_and_targets
from timm.task import ClassificationEvaluator
from torch import Tensor, nn

from ..data.images import ImageDataset
from ..data.sampling import draw
from ..devices import usable_device
from ..files import write_atomically
from ..layers import SpikingConv
from ..models.aliases import current_name
from ..models.loading import check_tag
from ..operators import Operator
from ..progress import Bar
from .evaluate import Evaluation, classify_batches, report
from .folder import check_folder

Sample = tuple[str, int]  # path and class index

_SYNSET = re.compile(r"(?<![A-Za-z0-9])n\d{8}(?!\d)")
_SAVE_EVERY = 10.0  # seconds between two writes of the progress file


class _Pass(ClassificationEvaluator):
    """One kind of neurons, and what was counted with it so far: `sums` of the samples that are `done`."""

    def __init__(self, net: nn.Module, coupled: bool, done: int, sums: dict[str, float]) -> None:
        super().__init__()
        self.net = net
        self.coupled = coupled
        self.seconds = sums["seconds"]  # of the forward passes alone
        self.counts = torch.tensor([done, sums["top1"], sums["top5"]])
        self.loss_sum.fill_(sums.get("loss", float("nan")))  # files of earlier versions have none

    def __call__(self, images: Tensor) -> Tensor:
        for layer in coupled_layers(self.net):
            layer.batch_coupled = self.coupled
        start = time.perf_counter()
        logits: Tensor = self.net(images).cpu()  # waits for the device
        self.seconds += time.perf_counter() - start
        return logits

    def sums(self) -> dict[str, float]:
        """What the progress file holds."""
        _, top1, top5 = self.counts.tolist()
        return {"top1": top1, "top5": top5, "seconds": self.seconds, "loss": self.loss_sum.item()}

    def measured(self) -> Evaluation:
        """The result so far."""
        samples = int(self.counts[0])
        return Evaluation(**self.summary(), samples=samples, samples_per_second=samples / self.seconds)


def verify(
    model: str,
    data: Path,
    *,
    neurons: str = "both",
    time_steps: int | None = None,
    batch_size: int = 32,
    limit: int | None = None,
    workers: int = 2,
    device: str | None = None,
    progress: Path | None = None,
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
        device: Where to run. None and "auto": CUDA if there is one, else CPU.
        progress: File to keep the counts in; a second call with the same arguments resumes from them.
        quiet: Show no progress bar.

    Returns:
        One `report` for each kind of neurons, with batch_coupled and images; images_per_second is that of the forward
        pass alone.

    Raises:
        ValueError: For an argument outside its range, images without a known class or a broken image, a model of
            neither 1 nor 3 channels.
    """
    _check_arguments(neurons, batch_size, limit, workers)
    on = usable_device(device)
    net: Any = _load(model, time_steps).to(on).eval()
    modes_of_images = {1: "L", 3: "RGB"}
    if net.in_chans not in modes_of_images:
        raise ValueError(
            f"{model} takes {net.in_chans} channels, images have 1 or 3"
            + ("; `timm-qkformer validate` measures models of event data" if net.in_chans == 2 else "")
        )
    samples = draw(find_samples(data, net.num_classes), limit)
    config = resolve_model_data_config(net)
    modes = _modes(net, neurons)
    key = _fingerprint(net, samples, config, batch_size, sorted(modes))
    done, sums = _read_progress(progress, key, modes)
    passes = {name: _Pass(net, coupled, done, sums[name]) for name, coupled in modes.items()}

    loader = create_loader(
        cast(Any, ImageDataset(samples[done:], modes_of_images[net.in_chans])),
        **config,
        batch_size=batch_size,
        num_workers=workers,
        persistent_workers=False,
        use_prefetcher=False,
        device=on,
    )
    saved = time.monotonic()
    with Bar(total=len(samples), initial=done, unit="img", disable=quiet or None) as bar:
        pairs = [(one, one) for one in passes.values()]
        for images in classify_batches(pairs, loader, on) if done < len(samples) else ():
            done += len(images)
            bar.update(len(images))
            bar.set_postfix({name: f"{one.measured().top1:.2f} %" for name, one in passes.items()})
            if progress is not None and (time.monotonic() - saved > _SAVE_EVERY or done == len(samples)):
                content = {"key": key, "done": done, "counts": {name: one.sums() for name, one in passes.items()}}
                write_atomically(progress, json.dumps(content))
                saved = time.monotonic()
    return [
        report(one.measured(), net, config, batch_size, on, model=model, batch_coupled=one.coupled, images=done)
        for one in passes.values()
    ]


def _check_arguments(neurons: str, batch_size: int, limit: int | None, workers: int) -> None:
    if neurons not in ("both", "per-sample", "coupled"):
        raise ValueError(f"neurons={neurons!r} is unknown, choose one of both, per-sample, coupled")
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be at least 1")
    if limit is not None and limit < 1:
        raise ValueError(f"limit={limit} must be at least 1")
    if workers < 0:
        raise ValueError(f"workers={workers} must not be negative")


def _load(model: str, time_steps: int | None) -> nn.Module:
    if (Path(model) / "config.json").is_file():
        name = f"local-dir:{model}"
    elif ":" in model or timm.is_model(model.split(".")[0]):
        name = current_name(model)
        check_tag(name)
    else:
        raise ValueError(f"{model} is neither a folder with a config.json nor a model that timm knows")
    if name.startswith("local-dir:"):
        check_folder(Path(name.removeprefix("local-dir:")))
    net: nn.Module = timm.create_model(name, pretrained=True, time_steps=time_steps)
    return net


def find_samples(data: Path, num_classes: int) -> list[Sample]:
    """Images below `data` with their class index, sorted by path; see `verify` for the two layouts.

    ValueError if there are no images, or their classes cannot be told.
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


def coupled_layers(net: nn.Module) -> list[SpikingConv]:
    """Layers whose neurons a release couples (QKFormer's, SpiLiFormer's): with membrane shortcuts there are none."""
    if not takes_coupling(net):  # self-attention in another paper's model
        return []
    operators = [module for module in net.modules() if isinstance(module, Operator) and module.couples_batch]
    last = [getattr(operator, operator.output) for operator in operators]
    return [layer for layer in last if not isinstance(layer.neuron, nn.Identity)]


def takes_coupling(net: nn.Module) -> bool:
    """Whether a model takes `batch_coupled`."""
    return "batch_coupled" in inspect.signature(type(net).__init__).parameters


def _modes(net: nn.Module, neurons: str) -> dict[str, bool]:
    """Kinds of neurons to measure, by name, and whether they are coupled."""
    modes = {"per-sample": False, "coupled": True}
    if not coupled_layers(net):
        if neurons == "coupled":
            raise ValueError(f"neurons='coupled': {type(net).__name__} has no coupled neurons")
        return {"per-sample": False}
    return modes if neurons == "both" else {neurons: modes[neurons]}


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


def _read_progress(path: Path | None, key: str, modes: dict[str, bool]) -> tuple[int, dict[str, dict[str, float]]]:
    if path is None or not path.exists():
        return 0, {name: {"top1": 0, "top5": 0, "seconds": 0.0, "loss": 0.0} for name in modes}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        found, done, sums = content["key"], int(content["done"]), dict(content["counts"])
        if found == key and not all({"top1", "top5", "seconds"} <= sums[name].keys() for name in modes):
            raise ValueError("counts are missing")
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"progress={str(path)!r} is not a progress file; delete it or name another") from error
    if found != key:
        raise ValueError(
            f"progress={str(path)!r} belongs to a run with other weights, images or settings; delete it or name another"
        )
    return done, sums
