"""What a training step costs against time steps, batch and resolution: seconds, and memory kept for backward.

    python benchmarks/scaling.py [--rounds 5] [--out benchmarks/results]

Fits cost = c * n^p to each sweep. Spiking networks are linear in T and in the batch by construction; the paper's claim
is linearity in the number of tokens, of QKTA and, with K^T V first, of SSA. See benchmarks/README.md.
"""

import argparse
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import timm
import torch
from torch import nn

from _common import OURS, RESULTS, Spread, environment, keep_freed_memory, save_figure, take_turns, write_json
from _training import TrainingStep, batch

BASE = {"time steps": 4, "batch": 2, "side": 48}
SWEEPS: dict[str, Sequence[int]] = {
    "time steps": (1, 2, 4, 8),
    "batch": (1, 2, 4, 8),
    "side": (32, 48, 64, 96),
}
# By how much a doubling may fall short of, or exceed, a doubling of the cost. Below: what does not grow (weights'
# gradients, the optimizer, overhead). Memory has no such part to speak of.
MAX_EXPONENT = {"seconds": 1.15, "megabytes": 1.02}


class Point(NamedTuple):
    """One size of a sweep. `size` is T, B, or the tokens of the first stage."""

    size: int
    seconds: Spread
    megabytes: float


def step_of(model_name: str, settings: dict[str, int]) -> TrainingStep:
    torch.manual_seed(0)
    model: nn.Module = timm.create_model(
        model_name, embed_dims=(48, 96, 192), num_classes=10, time_steps=settings["time steps"]
    )
    return TrainingStep(model, *batch(settings["batch"], settings["side"]), backend="auto")


def sweep(model_name: str, name: str, sizes: Sequence[int], rounds: int) -> list[Point]:
    """All sizes of a sweep take turns."""
    steps = {str(size): step_of(model_name, {**BASE, name: size}) for size in sizes}
    # Per batch, not per image.
    megabytes = {label: step.megabytes_kept() * len(step.images) for label, step in steps.items()}
    times = take_turns(steps, rounds, warm_up=1)
    return [
        Point((size // 4) ** 2 if name == "side" else size, Spread.of(times[str(size)]), megabytes[str(size)])
        for size in sizes
    ]


def exponent(sizes: Sequence[float], costs: Sequence[float]) -> float:
    """p of the least-squares fit log cost = log c + p log size."""
    xs, ys = [math.log(size) for size in sizes], [math.log(cost) for cost in costs]
    mean_x, mean_y = sum(xs) / len(xs), sum(ys) / len(ys)
    covariance = sum((x - mean_x) * (y - mean_y) for x, y in zip(xs, ys, strict=True))
    return covariance / sum((x - mean_x) ** 2 for x in xs)


def exponents(points: list[Point]) -> dict[str, float]:
    """Of seconds and of megabytes, fitted to the larger sizes, where fixed costs do not show."""
    large = points[1:]
    sizes = [point.size for point in large]
    return {
        "seconds": exponent(sizes, [point.seconds.median for point in large]),
        "megabytes": exponent(sizes, [point.megabytes for point in large]),
    }


def draw(sweeps: dict[str, list[Point]], title: str, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, len(sweeps), figsize=(4 * len(sweeps), 6), layout="constrained", sharex="col")
    for column, (name, points) in enumerate(sweeps.items()):
        sizes = [point.size for point in points]
        fits = exponents(points)
        for axis, unit in zip(axes[:, column], ("seconds", "megabytes"), strict=True):
            values = [point.seconds.median if unit == "seconds" else point.megabytes for point in points]
            axis.plot(sizes, values, "o-", color=OURS, label=f"measured, exponent {fits[unit]:.2f}")
            axis.plot(sizes, [values[-1] * size / sizes[-1] for size in sizes], ":", color="grey", label="linear")
            axis.set_xscale("log", base=2)
            axis.set_yscale("log")
            axis.set_ylabel(unit if unit == "seconds" else "MB kept for the backward pass")
            axis.legend()
        axes[1, column].set_xlabel(label_of(name))
    figure.suptitle(title)
    save_figure(figure, path)
    pyplot.close(figure)


def label_of(name: str) -> str:
    return "tokens of the first stage" if name == "side" else name


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="qkformer_hst10_384", help="built at half its width")
    parser.add_argument("--rounds", type=int, default=5, help="times that every size takes its turn")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for JSON and PNG")
    args = parser.parse_args()
    if args.rounds < 2:
        parser.error(f"--rounds={args.rounds} must be at least 2")

    start = time.perf_counter()
    reuse = keep_freed_memory()
    sweeps = {name: sweep(args.model, name, sizes, args.rounds) for name, sizes in SWEEPS.items()}
    fits = {name: exponents(points) for name, points in sweeps.items()}
    print(f"{'sweep':26} {'size':>6} {'seconds (quartiles)':>28} {'MB kept':>9}")
    for name, points in sweeps.items():
        for point in points:
            spread = f"{point.seconds:.3f}"
            print(f"{label_of(name):26} {point.size:>6} {spread:>28} {point.megabytes:>9.1f}")
    for name, fit in fits.items():
        for unit, value in fit.items():
            limit = MAX_EXPONENT[unit]
            verdict = "linear or less" if value <= limit else f"MORE than linear (above {limit})"
            print(f"{unit} grow with {label_of(name)} to the power of {value:.2f}: {verdict}")

    args.out.mkdir(parents=True, exist_ok=True)
    content = {
        "model": args.model,
        "base": BASE,
        "freed_memory_reused": reuse,
        **environment(),
        "points": {name: [point._asdict() for point in points] for name, points in sweeps.items()},
        "exponents": fits,
        "total_seconds": time.perf_counter() - start,
    }
    write_json(content, args.out / "scaling.json")
    draw(sweeps, f"Training step of {args.model} at half its width", args.out / "scaling.png")


if __name__ == "__main__":
    main()
