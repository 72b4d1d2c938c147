"""On a CUDA device: the LIF op, training steps and inference, beside spikingjelly 2.0 and timm's deit_base; memory.

    python benchmarks/gpu.py [--rounds 9] [--out benchmarks/results]
    python benchmarks/gpu.py --device cpu --tiny        # runs this script to its end anywhere; its figures say nothing

Contenders take turns within every round; times are CUDA events'. `make gpu` runs this after the tests. See
benchmarks/README.md.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from torch import Tensor, nn

import timm_qkformer
from _common import Spread, argument_parser, environment, ratios, spikingjelly_like, take_turns, write_json
from _training import TrainingStep, batch
from timm_qkformer.execution import execution_policy
from timm_qkformer.neurons import LIF

COPY, EAGER, COMPILED, THEIRS = "copy on the device", "ours, eager", "ours, compiled", "spikingjelly 2.0"
ANN = "deit_base_patch16_224"
# spikingjelly reads which kernels its LIF neurons take when it is imported: each choice needs a process of its own.
BACKENDS_VARIABLE = "SJ_LIF_CUDA_IMPLEMENTATION"
BACKENDS = ("triton", "torch", "auto")


class Sizes(NamedTuple):
    """How large everything is."""

    lif: tuple[int, ...]  # input currents [T, B, C, H, W]
    small: tuple[dict[str, Any], int, int]  # HST-4-384: arguments, batch, pixels
    large: tuple[dict[str, Any], int, int]  # HST-10-768
    ann: str


FULL = Sizes((4, 128, 96, 32, 32), ({}, 128, 32), ({}, 32, 224), ANN)
TINY = Sizes(
    (4, 1, 8, 8, 8),
    ({"embed_dims": (24, 48, 96), "time_steps": 2}, 2, 32),
    ({"embed_dims": (24, 48, 96), "num_heads": (1, 2, 4), "depths": (1, 1, 1), "time_steps": 2}, 1, 64),
    "deit_tiny_patch16_224",
)


class Row(NamedTuple):
    """What a table's line says."""

    name: str
    milliseconds: Spread
    against: Spread | None  # how many times as fast as the table's reference
    note: str  # bandwidth or memory


class Bench(NamedTuple):
    """Where and how long."""

    device: str
    rounds: int
    sizes: Sizes

    @property
    def fast(self) -> str:
        """Policy of the rows with compiled neurons; a trial on a CPU does not wait for the compiler."""
        return "eager" if self.device == "cpu" else "compile"

    def measure(self, contenders: dict[str, Callable[[], object]]) -> dict[str, list[float]]:
        """Seconds of each contender and round."""
        if self.device == "cpu":
            return take_turns(contenders, self.rounds, warm_up=1)
        return _take_turns_by_events(contenders, self.rounds)

    def peak(self, run: Callable[[], object]) -> float | None:
        """MB (10^6 bytes) that the device's allocator held at most during a call, beyond what was there before."""
        if self.device == "cpu":
            return None
        run()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 1e6


def _take_turns_by_events(contenders: dict[str, Callable[[], object]], rounds: int, warm_up: int = 3) -> Any:
    """`take_turns` by the device's own clock: the call's first to its last work on the current stream."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for i in range(rounds + warm_up):
        for name, run in contenders.items():
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            torch.cuda.synchronize()
            start.record()
            run()
            end.record()
            torch.cuda.synchronize()
            if i >= warm_up:
                times[name].append(start.elapsed_time(end) / 1e3)
    return times


def lif_passes(x: Tensor, grad: Tensor, run: Callable[[Tensor], Tensor]) -> dict[str, Callable[[], object]]:
    def forward() -> object:
        with torch.no_grad():
            return run(x)

    def both() -> object:
        leaf = x.detach().requires_grad_()
        return torch.autograd.grad(run(leaf), leaf, grad)

    return {"forward": forward, "forward + backward": both}


def lif_contenders(fast: str) -> dict[str, Callable[[Tensor], Tensor]]:
    """Each takes input currents [T, B, C, H, W] to spikes, from rest: hard reset, tau 2, threshold 1, sigmoid."""
    from spikingjelly.activation_based import functional
    from spikingjelly.activation_based.neuron import LIFNode

    ours, theirs = LIF(), LIFNode(detach_reset=True, step_mode="m")

    def spikingjelly(x: Tensor) -> Tensor:
        functional.reset_net(theirs)
        return theirs(x)

    def by(backend: str, x: Tensor) -> Tensor:
        with execution_policy(neurons=backend):
            return ours(x)

    return {EAGER: partial(by, "eager"), COMPILED: partial(by, fast), THEIRS: spikingjelly}


def measure_lif(bench: Bench) -> dict[str, dict[str, list[float]]]:
    """Seconds of each pass, contender and round, in this process; a copy of the currents takes its turn, too."""
    torch.manual_seed(0)
    x = torch.randn(bench.sizes.lif, device=bench.device) * 2.0
    grad, other = torch.randn_like(x), torch.empty_like(x)
    contenders = lif_contenders(bench.fast)
    wanted = contenders[EAGER](x)
    for name, run in contenders.items():
        if not torch.equal(run(x), wanted):
            raise SystemExit(f"{name}: spikes differ from those of {EAGER}")
    passes = {name: lif_passes(x, grad, run) for name, run in contenders.items()}
    return {
        which: bench.measure({COPY: lambda: other.copy_(x)} | {name: runs[which] for name, runs in passes.items()})
        for which in ("forward", "forward + backward")
    }


def lif_tables(bench: Bench) -> dict[str, list[Row]]:
    """For each of spikingjelly's backends, a process that times it beside ours and a copy."""
    tables = {}
    for backend in BACKENDS if bench.device == "cuda" else ("torch",):
        command = [sys.executable, __file__, "--lif-only", "--device", bench.device, "--rounds", str(bench.rounds)]
        command += ["--tiny"] if bench.sizes is TINY else []
        environ = {**os.environ, BACKENDS_VARIABLE: backend}
        child = subprocess.run(command, env=environ, capture_output=True, text=True, check=False)
        if child.returncode:  # a backend that this device or installation has not
            print(f"LIF beside spikingjelly's {backend} backend did not run: {child.stderr.strip()[-400:]}")
            continue
        for which, times in json.loads(child.stdout.splitlines()[-1]).items():
            tables[f"LIF, {which}, spikingjelly's backend: {backend}"] = lif_rows(bench, which, times)
    return tables


def lif_rows(bench: Bench, which: str, times: dict[str, list[float]]) -> list[Row]:
    size = 4
    for side in bench.sizes.lif:
        size *= side
    # Forwards the currents are read and the spikes written; backwards two are read and one written.
    passes_over_memory = {"forward": 2, "forward + backward": 5}[which]
    copied = 2 * size / Spread.of(times[COPY]).median
    rows = []
    for name, seconds in times.items():
        moved = (2 if name == COPY else passes_over_memory) * size / Spread.of(seconds).median
        note = f"{moved / 1e9:.0f} GB/s" + ("" if name == COPY else f", {100 * moved / copied:.0f} % of a copy's")
        rows.append(Row(name, Spread.of(seconds).scaled(1e3), ratios(times[THEIRS], seconds), note))
    return rows


def table(bench: Bench, runs: dict[str, Callable[[], object]], reference: str) -> list[Row]:
    """Rows of contenders that take turns; each one's peak of memory first."""
    peaks = {name: bench.peak(run) for name, run in runs.items()}
    times = bench.measure(runs)
    return [
        Row(
            name,
            Spread.of(seconds).scaled(1e3),
            ratios(times[reference], seconds),
            "" if (peak := peaks[name]) is None else f"{peak:.0f} MB",
        )
        for name, seconds in times.items()
    ]


def training_runs(bench: Bench, name: str, size: tuple[dict[str, Any], int, int]) -> dict[str, Callable[[], object]]:
    """A training step: ours, plain modules, spikingjelly's neurons in the same network and its own model, an ANN."""
    arguments, images_count, side = size
    torch.manual_seed(0)
    images, labels = batch(images_count, side, device=bench.device)

    def step(model: nn.Module, **options: object) -> TrainingStep:
        return TrainingStep(model.to(bench.device), images, labels, **options)

    def ours() -> nn.Module:
        torch.manual_seed(1)
        return timm.create_model(name, num_classes=10, **arguments)

    runs = {
        THEIRS + "'s neurons": step(ours(), neurons="spikingjelly"),
        THEIRS + "'s neurons, bf16": step(ours(), neurons="spikingjelly", half=True),
        "ours": step(ours(), neurons=bench.fast),
        "ours, bf16": step(ours(), neurons=bench.fast, half=True),
        "ours, plain modules": step(ours(), neurons=bench.fast, packed=False),
    }
    if "hst10" in name:  # spikingjelly has the ImageNet embedding alone
        runs |= {
            THEIRS + "'s model": step(spikingjelly_like(ours()), stateful=True),
            THEIRS + "'s model, bf16": step(spikingjelly_like(ours()), stateful=True, half=True),
        }
    if side == 224 or bench.sizes is TINY:
        ann, ann_images = timm.create_model(bench.sizes.ann, num_classes=10), batch(images_count, 224)[0]
        runs[bench.sizes.ann] = TrainingStep(ann.to(bench.device), ann_images.to(bench.device), labels)
        runs[f"{bench.sizes.ann}, bf16"] = TrainingStep(
            timm.create_model(bench.sizes.ann, num_classes=10).to(bench.device),
            ann_images.to(bench.device),
            labels,
            half=True,
        )
    return runs


def inference_runs(bench: Bench, name: str, size: tuple[dict[str, Any], int, int]) -> dict[str, Callable[[], object]]:
    """Inference: ours plain in eager mode and compiled, deployed; spikingjelly's neurons and model; an ANN."""
    arguments, images_count, side = size
    torch.manual_seed(0)
    images = torch.randn(images_count, 3, side, side, device=bench.device)
    model = timm.create_model(name, **arguments).to(bench.device)
    with torch.no_grad():  # batch norms as training leaves them, so that neurons fire throughout
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = None
        model.train()(images[:8])
    model.eval()

    def run(network: nn.Module, neurons: str = bench.fast, x: Tensor = images, half: bool = False) -> object:
        autocast = torch.autocast(bench.device, torch.bfloat16, enabled=half)
        with torch.inference_mode(), execution_policy(neurons=neurons), autocast:
            return network(x)

    runs: dict[str, Callable[[], object]] = {
        THEIRS + "'s neurons": partial(run, model, "spikingjelly"),
        "plain, eager neurons": partial(run, model, "eager"),
        "plain, compiled neurons": partial(run, model),
        "plain, compiled neurons, bf16": partial(run, model, half=True),
        "deployed fp32": partial(run, timm_qkformer.deploy(model, "fp32")),
        "deployed bf16": partial(run, timm_qkformer.deploy(model, "bf16")),
    }
    if "hst10" in name:
        theirs = spikingjelly_like(model).to(bench.device).eval()
        runs[THEIRS + "'s model"] = partial(_run_stateful, theirs, images)
    if side == 224 or bench.sizes is TINY:
        ann = timm.create_model(bench.sizes.ann).to(bench.device).eval()
        ann_images = torch.randn(images_count, 3, 224, 224, device=bench.device)
        runs[bench.sizes.ann] = partial(run, ann, x=ann_images)
        runs[f"{bench.sizes.ann}, bf16"] = partial(run, ann, x=ann_images, half=True)
    return runs


@torch.inference_mode()
def _run_stateful(model: nn.Module, images: Tensor) -> object:
    from spikingjelly.activation_based import functional

    functional.reset_net(model)
    return model(images)


def model_tables(bench: Bench) -> dict[str, list[Row]]:
    tables = {}
    for name, size in (("qkformer_hst4_384", bench.sizes.small), ("qkformer_hst10_768", bench.sizes.large)):
        title = f"{name}, {size[2]} px, batch {size[1]}"
        for what, make in (("training step", training_runs), ("inference", inference_runs)):
            print(f"{what}: {title}", flush=True)
            tables[f"{what}: {title}"] = table(bench, make(bench, name, size), THEIRS + "'s neurons")
            if bench.device == "cuda":
                torch.cuda.empty_cache()
    return tables


def device_facts(device: str) -> dict[str, object]:
    if device == "cpu":
        return {"device": "cpu", "label": "TRIAL OF THE SCRIPT ON A CPU: these figures say nothing about any device"}
    properties = torch.cuda.get_device_properties(0)
    return {
        "device": properties.name,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "memory_bytes": properties.total_memory,
        "cuda": torch.version.cuda,
        "tf32": {"matmul": torch.backends.cuda.matmul.allow_tf32, "cudnn": torch.backends.cudnn.allow_tf32},
    }


def as_text(tables: dict[str, list[Row]]) -> str:
    lines = []
    for title, rows in tables.items():
        lines += [f"\n{title}", f"{'contender':34} {'ms (quartiles)':>30} {'times as fast':>22}  memory or bandwidth"]
        for row in rows:
            against = f"{row.against:.2f}" if row.against else ""
            lines.append(f"{row.name:34} {f'{row.milliseconds:.3g}':>30} {against:>22}  {row.note}")
    return "\n".join(lines)


def parse() -> argparse.Namespace:
    parser = argument_parser(__doc__, rounds=9)
    parser.set_defaults(out=None)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--tiny", action="store_true", help="small sizes, to try the script itself")
    parser.add_argument("--lif-only", action="store_true", help="print the seconds of the LIF op as JSON")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.exit(2, "gpu.py: no CUDA device here; --device cpu --tiny tries the script itself\n")
    if args.device == "cpu" and not args.tiny:
        parser.error("--device cpu only tries the script itself: give --tiny, too")
    return args


def main() -> None:
    args = parse()
    bench = Bench(args.device, args.rounds, TINY if args.tiny else FULL)
    if args.lif_only:
        print(json.dumps(measure_lif(bench)))
        return
    start = time.perf_counter()
    facts = device_facts(args.device)
    print(facts.get("label", facts["device"]))
    tables = lif_tables(bench) | model_tables(bench)
    print(as_text(tables))
    content = {
        **facts,
        "tiny": args.tiny,
        "rounds": args.rounds,
        **environment("timm", "spikingjelly"),
        "tables": {title: [row._asdict() for row in rows] for title, rows in tables.items()},
        "text": as_text(tables),
        "total_seconds": time.perf_counter() - start,
    }
    folder: Path | None = args.out or (None if args.tiny else Path(__file__).parent / "results")
    if folder is not None:  # a trial leaves nothing among the results
        folder.mkdir(parents=True, exist_ok=True)
        write_json(content, folder / "gpu.json")


if __name__ == "__main__":
    main()
