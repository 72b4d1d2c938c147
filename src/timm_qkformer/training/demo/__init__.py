"""The demo: classify photographs with weights that come with the package, then fine-tune them on handwritten digits.

The photographs are the first four of each class of CIFAR-10's test set, the digits the 1,797 real scans that
scikit-learn ships, trained on through timm's own pipeline. Nothing is downloaded. Needs the extra `demo`.
"""

import tempfile
import time
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, cast

import timm
import torch
from timm.data import Mixup, create_dataset, create_loader, create_transform, resolve_model_data_config
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.task import ClassificationTask
from timm.utils import AverageMeter, accuracy
from torch import Tensor, nn

from ...analysis import firing_rates
from ...progress import Bar
from .report import Answers, draw_masks, print_answers

__all__ = ["MODEL", "DemoResult", "classify_photographs", "run_demo"]

MODEL = "qkformer_hst2_224.cifar10"
_SIDE = 32  # pixels, of photographs and digits
_NUM_CLASSES = 10
_INPUT: dict[str, Any] = {"input_size": (1, _SIDE, _SIDE), "mean": (0.3,), "std": (0.35,), "crop_pct": 1.0}
_LOADER = {**_INPUT, "interpolation": "bicubic", "use_prefetcher": False, "device": torch.device("cpu")}


@dataclass(frozen=True)
class DemoResult:
    """What a demo run measured."""

    photographs: float  # top-1 on the 40 photographs, percent
    digits: float  # top-1 on the held-out fifth of the digits, percent
    firing_rate: float  # spikes per neuron and time step, on digits
    images_per_second: float  # classifying digits, batches of 64
    seconds: float
    pictures: tuple[Path, Path]


def run_demo(output: Path, epochs: int = 4, seed: int = 42) -> DemoResult:
    """Classify photographs, fine-tune on four fifths of the digits, classify the last fifth; print and draw both.

    Args:
        output: Folder for the pictures, made if missing. Pictures of an earlier run there are replaced.
        epochs: Passes over the training digits.
        seed: Seed of everything random.

    Raises:
        ValueError: If `epochs` is below 1.
    """
    if epochs < 1:
        raise ValueError(f"epochs={epochs} must be at least 1")
    output.mkdir(parents=True, exist_ok=True)
    timm.utils.random_seed(seed)
    start = time.perf_counter()

    model = timm.create_model(MODEL, pretrained=True).eval()
    size = f"{sum(p.numel() for p in model.parameters()):,} parameters, T = {model.time_steps}"
    print(f"{MODEL}, weights from the package: {size}")
    photographs = classify_photographs(model)
    print_answers(photographs, rows=10)
    print(f"{photographs.correct} of {len(photographs.labels)} photographs of CIFAR-10's test set right\n")
    first = draw_masks(model, photographs, output / "photographs.png")

    print("fine-tuning on handwritten digits: one input channel instead of three, a new classifier")
    model, digits, speed = _fine_tune_on_digits(MODEL, epochs, seed)
    print_answers(digits, rows=12)
    rate = firing_rates(model, digits.images[:64]).mean
    second = draw_masks(model, digits, output / "digits.png")
    seconds = time.perf_counter() - start

    print(f"accuracy on {len(digits.labels)} held-out digits: {digits.top1:.1f} %")
    print(f"mean firing rate: {rate:.3f} spikes per neuron and time step")
    print(f"speed: {speed:.0f} images/s on {torch.get_num_threads()} threads; everything took {seconds:.0f} s")
    print(f"pictures: {first} {second}")
    return DemoResult(photographs.top1, digits.top1, rate, speed, seconds, (first, second))


@torch.inference_mode()
def classify_photographs(model: nn.Module) -> Answers:
    """Read, normalise and classify the sheet's pictures: one column for each class, in the order of the classes."""
    from PIL import Image

    config = resolve_model_data_config(model)
    transform = create_transform(**config, is_training=False)
    names = cast(dict[str, Any], model.pretrained_cfg)["label_names"]
    with files(__package__).joinpath("cifar10.png").open("rb") as file, Image.open(file) as sheet:
        tiles = [(column, row) for row in range(sheet.height // _SIDE) for column in range(len(names))]
        pictures = [
            sheet.crop((_SIDE * column, _SIDE * row, _SIDE * (column + 1), _SIDE * (row + 1))).convert("RGB")
            for column, row in tiles
        ]
    images = torch.stack([transform(picture) for picture in pictures])
    labels = torch.tensor([column for column, _ in tiles])
    return Answers(images, labels, model(images), names, config["mean"], config["std"])


def _fine_tune_on_digits(model_name: str, epochs: int, seed: int) -> tuple[nn.Module, Answers, float]:
    """Train weights for photographs on most digits; the model, its answers to the last fifth, and how many a second."""
    # One input channel: the first convolution is summed over its three.
    model = timm.create_model(model_name, pretrained=True, in_chans=1)
    model.reset_classifier(_NUM_CLASSES)
    with tempfile.TemporaryDirectory() as folder:
        _write_digits(Path(folder), seed)
        _train(model, Path(folder), epochs)
        images, labels, logits, speed = _classify(model, Path(folder))
    names = [str(digit) for digit in range(_NUM_CLASSES)]
    return model, Answers(images, labels, logits, names, _INPUT["mean"], _INPUT["std"]), speed


def _write_digits(folder: Path, seed: int) -> None:
    """The scans as PNG files, train/<digit>/ and test/<digit>/: the layout that timm's ImageFolder reads."""
    from PIL import Image
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    indices = range(len(digits.target))
    splits = train_test_split(indices, test_size=0.2, random_state=seed, stratify=digits.target)
    for split, members in zip(("train", "test"), splits, strict=True):
        for i in members:
            target = folder / split / str(digits.target[i])
            target.mkdir(parents=True, exist_ok=True)
            scan = (digits.images[i] * 255 / 16).astype("uint8")
            Image.fromarray(scan).resize((_SIDE, _SIDE), Image.Resampling.BICUBIC).save(target / f"{i:04}.png")


def _loader(folder: Path, split: str, batch_size: int, **augmentation: Any) -> Any:
    dataset = create_dataset("", folder, split=split, input_img_mode="L")
    is_training = split == "train"
    return create_loader(
        dataset, batch_size=batch_size, is_training=is_training, num_workers=0, **_LOADER, **augmentation
    )


def _train(model: nn.Module, folder: Path, epochs: int) -> None:
    loader = _loader(folder, "train", 32, scale=(0.8, 1.0), ratio=(0.9, 1.1), hflip=0.0, color_jitter=0.0, re_prob=0.1)
    mixup = Mixup(mixup_alpha=0.2, prob=0.5, label_smoothing=0.1, num_classes=_NUM_CLASSES)
    task = ClassificationTask(model, criterion_kwargs={"soft_targets": True})
    optimizer = create_optimizer_v2(model, opt="adamw", lr=2e-3, weight_decay=0.02)
    scheduler, _ = create_scheduler_v2(
        optimizer, sched="cosine", num_epochs=epochs, min_lr=1e-5, step_on_epochs=False, updates_per_epoch=len(loader)
    )
    with Bar(total=epochs * len(loader), desc="training", unit="batch") as bar:
        task.train()
        for epoch in range(epochs):
            losses = AverageMeter()
            for images, labels in loader:
                result = task(*mixup(images, labels))
                optimizer.zero_grad()
                result["loss"].backward()
                optimizer.step()
                scheduler.step_update(bar.n + 1)
                losses.update(result["loss"].item(), len(images))
                bar.set_postfix(epoch=f"{epoch + 1}/{epochs}", loss=f"{losses.avg:.3f}")
                bar.update()


@torch.inference_mode()
def _classify(model: nn.Module, folder: Path) -> tuple[Tensor, Tensor, Tensor, float]:
    """Held-out images, labels, logits, and images classified per second."""
    model.eval()
    seen, answers, seconds, top1 = [], [], 0.0, AverageMeter()
    with Bar(_loader(folder, "test", 64), desc="classifying", unit="batch") as bar:
        for images, labels in bar:
            start = time.perf_counter()
            logits = model(images)
            seconds += time.perf_counter() - start
            seen.append((images, labels))
            answers.append(logits)
            top1.update(accuracy(logits, labels)[0].item(), len(labels))
            bar.set_postfix(top1=f"{top1.avg:.1f} %")
    inputs, targets = (torch.cat(parts) for parts in zip(*seen, strict=True))
    return inputs, targets, torch.cat(answers), len(targets) / seconds
