"""The demo: classify photographs with weights that come with the package, then fine-tune them on handwritten digits.

The photographs are 40 of CIFAR-10's test set, the digits the 1,797 real scans that scikit-learn ships; nothing is
downloaded. Needs the extra `demo`.
"""

import time
from dataclasses import dataclass
from pathlib import Path

import timm
import torch

from ...analysis import firing_rates
from .digits import fine_tune_on_digits
from .photographs import classify_photographs
from .report import draw_masks, print_answers

__all__ = ["MODEL", "DemoResult", "run_demo"]

MODEL = "qkformer_hst3_192.cifar10"


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

    print("fine-tuning on handwritten digits: one input channel instead of three, two time steps, a new classifier")
    model, digits, speed = fine_tune_on_digits(MODEL, epochs, seed)
    print_answers(digits, rows=12)
    rate = firing_rates(model, digits.images[:64]).mean
    second = draw_masks(model, digits, output / "digits.png")
    seconds = time.perf_counter() - start

    print(f"accuracy on {len(digits.labels)} held-out digits: {digits.top1:.1f} %")
    print(f"mean firing rate: {rate:.3f} spikes per neuron and time step")
    print(f"speed: {speed:.0f} images/s on {torch.get_num_threads()} threads; everything took {seconds:.0f} s")
    print(f"pictures: {first} {second}")
    return DemoResult(photographs.top1, digits.top1, rate, speed, seconds, (first, second))
