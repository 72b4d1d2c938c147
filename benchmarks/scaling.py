"""What a training step costs against time steps, batch and resolution: seconds, and memory kept for backward.

    python benchmarks/scaling.py [--rounds 5] [--out benchmarks/results]

Ours beside spikingjelly 2.0's model of the same widths, heads and depths, and one of timm's ANNs. Fits cost = c * n^p
to each sweep. Spiking networks are linear in T and in the batch by construction; the paper's claim is linearity in the
number of tokens, of QKTA and, with K^T V first, of SSA. See benchmarks/README.md.
"""

import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import timm
import torch
from torch import nn

from _common import (
    ANN,
    OURS,
    PEER,
    Spread,
    argument_parser,
    environment,
    save_figure,
    spikingjelly_like,
    take_turns,
    write_json,
)
from _training import TrainingStep, batch
from timm_qkformer.execution import keep_freed_memory

BASE = {"time steps": 4, "batch": 2, "side": 48}
SWEEPS: dict[str, Sequence[int]] = {
    "time steps": (1, 2, 4, 8),
    "batch": (1, 2, 4, 8),
    "side": (32, 48, 64, 96),
}
# By how much a doubling may fall short of, or exceed, a doubling of the cost. Below: what does not grow (weights'
# gradients, the optimizer, overhead). Memory has no such part to speak of.
MAX_EXPONENT = {"seconds": 1.15, "megabytes": 1.02}


OWN, THEIRS, ANN_NAME = "ours", "spikingjelly 2.0", "deit_tiny_patch16_224"
COLOURS = {OWN: OURS, THEIRS: PEER, ANN_NAME: ANN}


class Point(NamedTuple):
    """One size of a sweep. `size` is T, B, or the tokens of the first stage."""

    size: int
    seconds: Spread
    megabytes: float


Sweep = dict[str, list[Point]]  # by contender


def step_of(contender: str, model_name: str, settings: dict[str, int]) -> TrainingStep:
    torch.manual_seed(0)
    images, labels = batch(settings["batch"], settings["side"])
    if contender == ANN_NAME:
        ann = timm.create_model(ANN_NAME, num_classes=10, img_size=settings["side"])
        return TrainingStep(ann, images, labels)
    ours: nn.Module = timm.create_model(
        model_name, embed_dims=(48, 96, 192), num_classes=10, time_steps=settings["time steps"]
    )
    if contender == THEIRS:
        return TrainingStep(spikingjelly_like(ours), images, labels, stateful=True)
    return TrainingStep(ours, images, labels, neurons="compile", kernels="always")


def sweep(model_name: str, name: str, sizes: Sequence[int], rounds: int) -> Sweep:
    """All contenders and sizes of a sweep take turns."""
    contenders = [contender for contender in COLOURS if (contender, name) != (ANN_NAME, "time steps")]
    steps = {
        f"{contender} {size}": step_of(contender, model_name, {**BASE, name: size})
        for size in sizes
        for contender in contenders
    }
    # Per batch, not per image.
    megabytes = {label: step.megabytes_kept() * len(step.images) for label, step in steps.items()}
    times = take_turns(steps, rounds, warm_up=1)

    def point(label: str, size: int) -> Point:
        return Point((size // 4) ** 2 if name == "side" else size, Spread.of(times[label]), megabytes[label])

    return {contender: [point(f"{contender} {size}", size) for size in sizes] for contender in contenders}


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


def draw(sweeps: dict[str, Sweep], title: str, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, len(sweeps), figsize=(4 * len(sweeps), 6), layout="constrained", sharex="col")
    for column, (name, contenders) in enumerate(sweeps.items()):
        for axis, unit in zip(axes[:, column], ("seconds", "megabytes"), strict=True):
            for contender, points in contenders.items():
                sizes = [point.size for point in points]
                values = [point.seconds.median if unit == "seconds" else point.megabytes for point in points]
                label = f"{contender}, exponent {exponents(points)[unit]:.2f}"
                axis.plot(sizes, values, "o-", color=COLOURS[contender], label=label)
            own = contenders[OWN][-1]
            end = own.seconds.median if unit == "seconds" else own.megabytes
            axis.plot(sizes, [end * size / own.size for size in sizes], ":", color="grey", label="linear")
            axis.set_xscale("log", base=2)
            axis.set_yscale("log")
            axis.set_ylabel(unit if unit == "seconds" else "MB kept for the backward pass")
            axis.legend(fontsize=7)
        axes[1, column].set_xlabel(label_of(name))
    figure.suptitle(title)
    save_figure(figure, path)
    pyplot.close(figure)


def label_of(name: str) -> str:
    return "tokens of the first stage" if name == "side" else name


def print_tables(sweeps: dict[str, Sweep]) -> None:
    print(f"{'sweep':26} {'size':>5} {'contender':22} {'seconds (quartiles)':>24} {'MB kept':>9}")
    for name, contenders in sweeps.items():
        for contender, points in contenders.items():
            for point in points:
                cells = f"{f'{point.seconds:.3f}':>24} {point.megabytes:>9.1f}"
                print(f"{label_of(name):26} {point.size:>5} {contender:22} {cells}")
    for name, contenders in sweeps.items():
        for contender, points in contenders.items():
            powers = exponents(points)
            for unit, value in powers.items():
                verdict = ""
                if contender == OWN:
                    limit = MAX_EXPONENT[unit]
                    verdict = ": linear or less" if value <= limit else f": MORE than linear (above {limit})"
                print(f"{contender}: {unit} grow with {label_of(name)} to the power of {value:.2f}{verdict}")


def main() -> None:
    parser = argument_parser(__doc__, rounds=5)
    parser.add_argument("--model", default="qkformer_hst10_384", help="built at half its width")
    args = parser.parse_args()

    start = time.perf_counter()
    reuse = keep_freed_memory()
    sweeps = {name: sweep(args.model, name, sizes, args.rounds) for name, sizes in SWEEPS.items()}
    print_tables(sweeps)

    args.out.mkdir(parents=True, exist_ok=True)
    content = {
        "model": args.model,
        "base": BASE,
        "freed_memory_reused": reuse,
        **environment("timm", "spikingjelly"),
        "points": {
            name: {contender: [point._asdict() for point in points] for contender, points in contenders.items()}
            for name, contenders in sweeps.items()
        },
        "exponents": {
            name: {contender: exponents(points) for contender, points in contenders.items()}
            for name, contenders in sweeps.items()
        },
        "total_seconds": time.perf_counter() - start,
    }
    write_json(content, args.out / "scaling.json")
    draw(sweeps, f"Training step of {args.model} at half its width", args.out / "scaling.png")


if __name__ == "__main__":
    main()
