"""The demo: train a small spiking transformer on handwritten digits through timm's own pipeline, and look inside.

The digits are the 1,797 real 8x8 scans that scikit-learn ships; nothing is downloaded. Needs the extra `demo`.
"""

import tempfile
import time
from dataclasses import dataclass
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

from .._files import replacing
from ..analysis import firing_rates, record_spikes
from ..models import QKFormer

__all__ = ["DemoResult", "run_demo"]

IMG_SIZE = 32
NUM_CLASSES = 10
MODEL = "qkformer_hst4_384"
MODEL_ARGS: dict[str, Any] = {
    # ImageNet's embedding: 8x8 tokens in the first stage, one for each pixel of a scan.
    "patch_embed": "imagenet",
    "embed_dims": (24, 48, 96),
    "depths": (1, 1, 1),
    "time_steps": 4,
    "in_chans": 1,
    "num_classes": NUM_CLASSES,
    "drop_path_rate": 0.05,
}
INPUT = {"input_size": (1, IMG_SIZE, IMG_SIZE), "mean": (0.3,), "std": (0.35,), "crop_pct": 1.0}
LOADER = {**INPUT, "interpolation": "bicubic", "use_prefetcher": False, "device": torch.device("cpu")}


@dataclass(frozen=True)
class DemoResult:
    """What a demo run measured on the held-out fifth."""

    accuracy: float  # top-1, percent
    firing_rate: float  # spikes per neuron and time step
    images_per_second: float  # classifying, batches of 64
    seconds: float  # training and evaluation
    picture: Path


def run_demo(output: Path, epochs: int = 12, seed: int = 42) -> DemoResult:
    """Train on four fifths of the digits, classify the last fifth, print a report and save a picture.

    Args:
        output: Folder for the picture, made if missing. A picture of an earlier run there is replaced.
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
    with tempfile.TemporaryDirectory() as folder:
        _write_digits(Path(folder), seed)
        model = timm.create_model(MODEL, **MODEL_ARGS)
        params = sum(p.numel() for p in model.parameters())
        print(f"{MODEL} with {MODEL_ARGS['embed_dims']} channels: {params:,} parameters, T = {model.time_steps}")
        _train(model, Path(folder), epochs)
        images, labels, logits, speed = _classify(model, Path(folder))
    seconds = time.perf_counter() - start

    top1 = 100.0 * (logits.argmax(1) == labels).float().mean().item()
    rate = firing_rates(model, images[:64]).mean
    _print_table(labels, logits)
    picture = _draw(model, images, labels, logits, output / "digits.png")
    print(f"accuracy on {len(labels)} held-out digits: {top1:.1f} %")
    print(f"mean firing rate: {rate:.3f} spikes per neuron and time step")
    print(f"speed: {speed:.0f} images/s on {torch.get_num_threads()} threads; everything took {seconds:.0f} s")
    print(f"picture: {picture}")
    return DemoResult(top1, rate, speed, seconds, picture)


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


def _train(model: QKFormer, folder: Path, epochs: int) -> None:
    loader = _loader(folder, "train", 32, scale=(0.8, 1.0), ratio=(0.9, 1.1), hflip=0.0, color_jitter=0.0, re_prob=0.1)
    mixup = Mixup(mixup_alpha=0.2, prob=0.5, label_smoothing=0.1, num_classes=NUM_CLASSES)
    task = ClassificationTask(model, criterion_kwargs={"soft_targets": True})
    optimizer = create_optimizer_v2(model, opt="adamw", lr=3e-3, weight_decay=0.02)
    scheduler, _ = create_scheduler_v2(
        optimizer, sched="cosine", num_epochs=epochs, warmup_epochs=min(2, epochs - 1), warmup_lr=1e-4, min_lr=1e-5
    )
    with tqdm(total=epochs * len(loader), desc="training", unit="batch") as bar:
        for epoch in range(epochs):
            task.train()
            scheduler.step(epoch)
            losses = AverageMeter()
            for images, labels in loader:
                result = task(*mixup(images, labels))
                optimizer.zero_grad()
                result["loss"].backward()
                optimizer.step()
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


def _print_table(labels: Tensor, logits: Tensor, rows: int = 12) -> None:
    """Some digits of every class, and each mistake among the first hundred."""
    confidence, predicted = logits.softmax(1).max(1)
    picked = torch.linspace(0, len(labels) - 1, rows).long().tolist()
    mistakes = (predicted != labels).nonzero().flatten().tolist()
    print("\n true  predicted  confidence")
    for i in sorted({*picked, *mistakes[:rows]}):
        mark = "" if predicted[i] == labels[i] else "  wrong"
        print(f"{labels[i]:5d}  {predicted[i]:9d}  {100 * confidence[i]:8.1f} %{mark}")
    print()


@torch.inference_mode()
def _draw(model: QKFormer, images: Tensor, labels: Tensor, logits: Tensor, path: Path, columns: int = 6) -> Path:
    """Inputs above the first stage's Q-K token masks: at each time step, the share of heads that keep a token."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    picked = torch.linspace(0, len(labels) - 1, columns).long()
    with record_spikes(model, suffix="stages.0.blocks.0.attn.attn_neuron") as spikes:
        model(images[picked])
    (mask,) = spikes.values()  # [T, B, heads, 1, tokens]
    side = int(mask.shape[-1] ** 0.5)
    kept = mask.mean((2, 3)).unflatten(-1, (side, side))  # [T, B, H, W]

    rows = 1 + len(kept)
    figure, axes = plt.subplots(rows, columns, figsize=(1.6 * columns + 1, 1.7 * rows), layout="constrained")
    for column, i in enumerate(picked.tolist()):
        axes[0, column].imshow(images[i, 0], cmap="gray")
        axes[0, column].set_title(f"{labels[i]}, read as {logits[i].argmax()}")
        for t in range(len(kept)):
            shown = axes[t + 1, column].imshow(kept[t, column], cmap="gray", vmin=0, vmax=1)
    for axis in axes.flat:
        axis.set_xticks([])
        axis.set_yticks([])
    axes[0, 0].set_ylabel("input")
    for t in range(len(kept)):
        axes[t + 1, 0].set_ylabel(f"mask, t = {t + 1}")
    figure.colorbar(shown, ax=axes[1:, :], label="share of heads that keep the token", shrink=0.6)
    figure.suptitle("Q-K token attention of the first block")
    with replacing(path) as file:
        figure.savefig(file, dpi=120, format="png")
    plt.close(figure)
    return path
