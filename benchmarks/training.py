"""The training step: ours beside spikingjelly 2.0's neurons in the same network and its own model; time and memory.

    python benchmarks/training.py [--batch 16] [--rounds 5] [--no-cold-start] [--out benchmarks/results]

Contenders take turns within every round. See benchmarks/README.md.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from typing import NamedTuple

import timm
import torch

from _common import (
    ANN,
    OURS,
    OURS_SLOWER,
    PEER,
    Bar,
    Spread,
    argument_parser,
    draw_bars,
    environment,
    ratios,
    spikingjelly_like,
    take_turns,
    write_json,
)
from _training import TrainingStep, batch
from timm_qkformer.execution import keep_freed_memory

FP32, BF16 = "ours", "ours, bf16"
PLAIN = "ours, plain modules"
NEURONS, NEURONS_BF16 = "spikingjelly 2.0's neurons", "spikingjelly 2.0's neurons, bf16"
OWN_MODEL = "spikingjelly 2.0's model"
IMAGENET = "ours, HST-10-384"
ANN_NAME = "resnet18"
COLOURS = {FP32: OURS, BF16: OURS, IMAGENET: OURS, PLAIN: OURS_SLOWER, ANN_NAME: ANN}

# The claims. Speed: against spikingjelly's neurons in the same network in float32, as its users train it.
SPEED_TARGETS = {FP32: 2.3, BF16: 3.4}
MEGABYTES_TARGET = 22.0  # bfloat16
RELEASE_MEGABYTES = 167.6  # the authors' release, measured once: it is no package that this script could run
COLD_START_TARGET = 45.0

CIFAR_SIDE, IMAGENET_SIDE = 32, 64
FAST = {"neurons": "compile", "kernels": "always"}


def multiplies_bfloat16() -> bool:
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()


def contenders(size: int, peers_in_half: bool) -> dict[str, TrainingStep]:
    """HST-4-384 at 32 pixels, each time the same network, and an ANN for orientation."""
    torch.manual_seed(0)
    images, labels = batch(size, CIFAR_SIDE)

    def hst(**options: object) -> TrainingStep:
        torch.manual_seed(1)
        return TrainingStep(timm.create_model("qkformer_hst4_384"), images, labels, **options)

    steps = {
        FP32: hst(**FAST),
        BF16: hst(**FAST, half=True),
        PLAIN: hst(**FAST, packed=False),
        NEURONS: hst(neurons="spikingjelly", kernels="never"),
        ANN_NAME: TrainingStep(timm.create_model(ANN_NAME, num_classes=10), images, labels),
    }
    if peers_in_half:
        steps[NEURONS_BF16] = hst(neurons="spikingjelly", kernels="never", half=True)
    return steps


def imagenet_contenders(size: int) -> dict[str, TrainingStep]:
    """HST-10-384 at 64 pixels: ours, and spikingjelly's model of that name."""
    torch.manual_seed(0)
    images, labels = batch(size, IMAGENET_SIDE)
    ours = timm.create_model("qkformer_hst10_384", num_classes=10)
    theirs = spikingjelly_like(ours)
    return {
        IMAGENET: TrainingStep(ours, images, labels, **FAST),
        OWN_MODEL: TrainingStep(theirs, images, labels, stateful=True),
    }


def check_that_they_agree(steps: dict[str, TrainingStep]) -> None:
    """One image's loss and gradients in float64, where no neuron near its threshold flips with a rounding error."""
    results = []
    images, labels = batch(1, CIFAR_SIDE)
    for name in (FP32, PLAIN, NEURONS):
        torch.manual_seed(1)
        model = timm.create_model("qkformer_hst4_384", embed_dims=(24, 48, 96), time_steps=2).double()
        policy = {**steps[name].policy, "kernels": "never"}
        policy["neurons"] = "spikingjelly" if name == NEURONS else "eager"
        step = TrainingStep(model, images.double(), labels, **policy)
        loss = step.loss()
        loss.backward()
        results.append([loss.detach(), *(p.grad for p in model.parameters())])
    for other in results[1:]:
        for own, wanted in zip(results[0], other, strict=True):
            torch.testing.assert_close(own, wanted, rtol=1e-7, atol=1e-10)


class Row(NamedTuple):
    """What a table's line says."""

    contender: str
    seconds: Spread
    speedup: Spread  # against the table's reference
    megabytes: float  # kept for the backward pass, per image


def compare(steps: dict[str, TrainingStep], reference: str, rounds: int) -> tuple[list[Row], dict[str, list[float]]]:
    megabytes = {name: step.megabytes_kept() for name, step in steps.items()}
    times = take_turns(steps, rounds, warm_up=1)
    rows = [
        Row(name, Spread.of(values), ratios(times[reference], values), megabytes[name])
        for name, values in times.items()
    ]
    return rows, times


def cold_start(size: int) -> dict[str, float]:
    """Seconds of the steps of a fresh process without any compiled kernel at hand, with everything on "auto"."""
    with tempfile.TemporaryDirectory() as cache:
        command = [sys.executable, __file__, "--cold-start-only", "--batch", str(size)]
        environ = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache}
        output = subprocess.run(command, env=environ, check=True, capture_output=True, text=True).stdout
    seconds = json.loads(output)
    return {"first": seconds[0], "slowest": max(seconds), "last": seconds[-1], "steps": len(seconds)}


def cold_start_steps(size: int, steps: int = 6) -> list[float]:
    images, labels = batch(size, CIFAR_SIDE)
    step = TrainingStep(timm.create_model("qkformer_hst4_384"), images, labels)
    seconds = []
    for _ in range(steps):
        start = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start)
    return seconds


def print_table(title: str, rows: list[Row]) -> None:
    print(f"\n{title}\n{'contender':34} {'seconds (quartiles)':>26} {'speed-up':>24} {'MB kept per image':>18}")
    for row in rows:
        print(f"{row.contender:34} {f'{row.seconds:.2f}':>26} {f'{row.speedup:.2f}':>24} {row.megabytes:>18.1f}")


def print_claims(rows: list[Row], cold: dict[str, float] | None) -> None:
    found = {row.contender: row for row in rows}
    for name, target in SPEED_TARGETS.items():
        reached = found[name].speedup.median
        print(f"{name}: {reached:.2f} x, target {target} x: {'reached' if reached >= target else 'NOT reached'}")
    if not multiplies_bfloat16():
        print("  (this CPU does not multiply bfloat16: products are computed in float32 and rounded)")
    megabytes = found[BF16].megabytes
    print(
        f"{BF16}: {megabytes:.1f} MB an image ({RELEASE_MEGABYTES} in the release), target {MEGABYTES_TARGET}: "
        + ("reached" if megabytes <= MEGABYTES_TARGET else "NOT reached")
    )
    if cold:
        verdict = "reached" if cold["first"] < COLD_START_TARGET else "NOT reached"
        print(
            f"cold start: first step {cold['first']:.1f} s, slowest of {cold['steps']:.0f} {cold['slowest']:.1f} s; "
            f"target {COLD_START_TARGET:.0f} s: {verdict}"
        )


def bars(rows: list[Row]) -> list[Bar]:
    return [
        Bar(row.contender, row.seconds, f"{row.speedup.median:.2f} x", COLOURS.get(row.contender, PEER)) for row in rows
    ]


def memory_bars(rows: list[Row]) -> list[Bar]:
    def bar(name: str, megabytes: float, colour: str) -> Bar:
        return Bar(name, Spread(megabytes, megabytes, megabytes), f"{megabytes:.0f} MB", colour)

    release = bar("authors' release", RELEASE_MEGABYTES, PEER)
    return [bar(row.contender, row.megabytes, COLOURS.get(row.contender, PEER)) for row in rows] + [release]


def main() -> None:
    parser = argument_parser(__doc__, rounds=5)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--imagenet-batch", type=int, default=4, help="for spikingjelly's own model; 0 leaves it out")
    parser.add_argument("--no-cold-start", action="store_true", help="leave out the fresh process")
    parser.add_argument("--cold-start-only", action="store_true", help="print the seconds of a fresh process's steps")
    args = parser.parse_args()
    if args.batch < 1:
        parser.error(f"--batch={args.batch} must be at least 1")
    if args.cold_start_only:
        print(json.dumps(cold_start_steps(args.batch)))
        return

    start = time.perf_counter()
    reuse = keep_freed_memory()
    steps = contenders(args.batch, multiplies_bfloat16())
    check_that_they_agree(steps)
    rows, times = compare(steps, NEURONS, args.rounds)
    del steps
    threads = torch.get_num_threads()
    title = f"HST-4-384, {CIFAR_SIDE} px, T = 4, batch {args.batch}, {threads} threads"
    print_table(title, rows)
    other_rows: list[Row] = []
    if args.imagenet_batch:
        other_rows, other_times = compare(imagenet_contenders(args.imagenet_batch), OWN_MODEL, args.rounds)
        print_table(f"HST-10-384, {IMAGENET_SIDE} px, T = 4, batch {args.imagenet_batch}", other_rows)
        times |= other_times
    cold = None if args.no_cold_start else cold_start(args.batch)
    print_claims(rows, cold)

    args.out.mkdir(parents=True, exist_ok=True)
    content = {
        "batch": args.batch,
        "imagenet_batch": args.imagenet_batch,
        "freed_memory_reused": reuse,
        "cpu_multiplies_bfloat16": multiplies_bfloat16(),
        "release_megabytes_kept": RELEASE_MEGABYTES,
        **environment("spikingjelly"),
        "rows": [row._asdict() for row in [*rows, *other_rows]],
        "seconds": times,
        "cold_start_seconds": cold,
        "total_seconds": time.perf_counter() - start,
    }
    write_json(content, args.out / "training.json")
    draw_bars({"training step": bars(rows)}, "seconds", title, args.out / "training.png")
    draw_bars({"kept for the backward pass": memory_bars(rows)}, "MB an image", title, args.out / "training_memory.png")


if __name__ == "__main__":
    main()
