"""Handwritten digits through timm's own pipeline: files, loader, mixup, optimiser, schedule and training task."""

import tempfile
import time
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import Mixup, create_dataset, create_loader
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.task import ClassificationTask
from timm.utils import AverageMeter, accuracy
from torch import Tensor, nn
from tqdm import tqdm

from .report import Answers

__all__ = ["fine_tune_on_digits"]

IMG_SIZE = 32
NUM_CLASSES = 10
INPUT: dict[str, Any] = {"input_size": (1, IMG_SIZE, IMG_SIZE), "mean": (0.3,), "std": (0.35,), "crop_pct": 1.0}
LOADER = {**INPUT, "interpolation": "bicubic", "use_prefetcher": False, "device": torch.device("cpu")}


def fine_tune_on_digits(model_name: str, epochs: int, seed: int) -> tuple[nn.Module, Answers, float]:
    """Start from trained weights for photographs, train on four fifths of the digits, classify the last fifth.

    Returns:
        The model, its answers to the held-out digits, and how many it classified in a second.
    """
    # One input channel: the first convolution is summed over its three. Two time steps: half the time of four.
    model = timm.create_model(model_name, pretrained=True, in_chans=1, time_steps=2)
    model.reset_classifier(NUM_CLASSES)
    with tempfile.TemporaryDirectory() as folder:
        _write_digits(Path(folder), seed)
        _train(model, Path(folder), epochs)
        images, labels, logits, speed = _classify(model, Path(folder))
    names = [str(digit) for digit in range(NUM_CLASSES)]
    return model, Answers(images, labels, logits, names, INPUT["mean"], INPUT["std"]), speed


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
            Image.fromarray(scan).resize((IMG_SIZE, IMG_SIZE), Image.Resampling.BICUBIC).save(target / f"{i:04}.png")


def _loader(folder: Path, split: str, batch_size: int, **augmentation: Any) -> Any:
    dataset = create_dataset("", folder, split=split, input_img_mode="L")
    is_training = split == "train"
    return create_loader(
        dataset, batch_size=batch_size, is_training=is_training, num_workers=0, **LOADER, **augmentation
    )


def _train(model: nn.Module, folder: Path, epochs: int) -> None:
    loader = _loader(folder, "train", 32, scale=(0.8, 1.0), ratio=(0.9, 1.1), hflip=0.0, color_jitter=0.0, re_prob=0.1)
    mixup = Mixup(mixup_alpha=0.2, prob=0.5, label_smoothing=0.1, num_classes=NUM_CLASSES)
    task = ClassificationTask(model, criterion_kwargs={"soft_targets": True})
    optimizer = create_optimizer_v2(model, opt="adamw", lr=2e-3, weight_decay=0.02)
    scheduler, _ = create_scheduler_v2(
        optimizer, sched="cosine", num_epochs=epochs, min_lr=1e-5, step_on_epochs=False, updates_per_epoch=len(loader)
    )
    with tqdm(total=epochs * len(loader), desc="training", unit="batch") as bar:
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
    with tqdm(_loader(folder, "test", 64), desc="classifying", unit="batch") as bar:
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
