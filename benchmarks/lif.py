"""The LIF op: ours in eager mode and compiled, beside spikingjelly 2.0's, forward and forward + backward.

    python benchmarks/lif.py [--shape 4,32,96,32,32] [--rounds 15] [--out benchmarks/results]

Contenders take turns within every round, so that whatever else the machine does hits all of them; ratios are medians
of the rounds' ratios. See benchmarks/README.md.
"""

import argparse
import ctypes
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor

from timm_qkformer.layers import LIF, set_lif_backend

EAGER, COMPILED, SPIKINGJELLY = "ours, eager", "ours, compiled", "spikingjelly 2.0"
# The claim: spikingjelly's time over that of our compiled op.
TARGETS = {"forward": 9.0, "forward + backward": 6.0}


def contenders(device: str) -> dict[str, Callable[[Tensor], Tensor]]:
    """Each takes input currents [T, B, C, H, W] to spikes, from rest: hard reset to 0, tau 2, threshold 1, sigmoid."""
    from spikingjelly.activation_based import functional
    from spikingjelly.activation_based.neuron import LIFNode

    ours = LIF().to(device)
    theirs = LIFNode(detach_reset=True, step_mode="m").to(device)

    def spikingjelly(x: Tensor) -> Tensor:
        functional.reset_net(theirs)  # a stateful neuron's rest, as its training loops do it
        return theirs(x)

    def with_backend(name: str) -> Callable[[Tensor], Tensor]:
        def run(x: Tensor) -> Tensor:
            with set_lif_backend(name):
                return ours(x)

        return run

    return {EAGER: with_backend("eager"), COMPILED: with_backend("compile"), SPIKINGJELLY: spikingjelly}


def passes(x: Tensor, grad: Tensor) -> dict[str, Callable[[Callable[[Tensor], Tensor]], object]]:
    def forward(neuron: Callable[[Tensor], Tensor]) -> object:
        with torch.no_grad():
            return neuron(x)

    def forward_backward(neuron: Callable[[Tensor], Tensor]) -> object:
        leaf = x.detach().requires_grad_()
        return torch.autograd.grad(neuron(leaf), leaf, grad)

    return {"forward": forward, "forward + backward": forward_backward}


def seconds(function: Callable[[], object], device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    function()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def check_that_they_agree(neurons: dict[str, Callable[[Tensor], Tensor]], x: Tensor, grad: Tensor) -> None:
    step = passes(x, grad)
    spikes = {name: step["forward"](neuron) for name, neuron in neurons.items()}
    grads = {name: step["forward + backward"](neuron)[0] for name, neuron in neurons.items()}
    for name in neurons:
        if not torch.equal(spikes[name], spikes[EAGER]):
            raise SystemExit(f"{name}: spikes differ from those of {EAGER}")
        torch.testing.assert_close(grads[name], grads[EAGER], rtol=1e-4, atol=1e-5)


def keep_freed_memory() -> bool:
    """Let the C library reuse freed memory instead of returning every large block to the kernel.

    By default glibc maps and unmaps each tensor of this size anew, and filling the page tables takes longer than the
    op. All contenders get the same treatment.
    """
    if sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "mallopt"):
        return False
    libc = ctypes.CDLL(None)
    trim_threshold, mmap_max = -1, -4
    return bool(libc.mallopt(mmap_max, 0) and libc.mallopt(trim_threshold, 2**31 - 1))


def measure(shape: tuple[int, ...], rounds: int, device: str) -> dict[str, dict[str, list[float]]]:
    """Seconds of every pass, contender and round."""
    torch.manual_seed(0)
    x = torch.randn(shape, device=device) * 2.0
    grad = torch.randn(shape, device=device)
    neurons = contenders(device)
    check_that_they_agree(neurons, x, grad)
    times: dict[str, dict[str, list[float]]] = {}
    for name, step in passes(x, grad).items():
        times[name] = {neuron: [] for neuron in neurons}
        for i in range(rounds + 2):
            for neuron, run in neurons.items():
                elapsed = seconds(lambda step=step, run=run: step(run), device)
                if i >= 2:  # the first rounds warm up
                    times[name][neuron].append(elapsed)
    return times


def summarise(times: dict[str, dict[str, list[float]]]) -> list[dict[str, object]]:
    rows = []
    for name, by_neuron in times.items():
        for neuron, values in by_neuron.items():
            ratios = [theirs / own for theirs, own in zip(by_neuron[SPIKINGJELLY], values, strict=True)]
            lower, median, upper = statistics.quantiles(values, n=4)
            ratio_lower, ratio, ratio_upper = statistics.quantiles(ratios, n=4)
            rows.append(
                {
                    "pass": name,
                    "neuron": neuron,
                    "milliseconds": median * 1e3,
                    "quartiles": [lower * 1e3, upper * 1e3],
                    "speedup": ratio,
                    "speedup_quartiles": [ratio_lower, ratio_upper],
                }
            )
    return rows


def print_table(rows: list[dict[str, object]]) -> None:
    print(f"{'pass':20} {'neuron':18} {'ms (quartiles)':>28} {'against spikingjelly 2.0':>28}")
    for row in rows:
        low, high = row["quartiles"]
        ratio_low, ratio_high = row["speedup_quartiles"]
        spread = f"{row['milliseconds']:8.2f} ({low:.2f} to {high:.2f})"
        speedup = f"{row['speedup']:6.2f} x ({ratio_low:.2f} to {ratio_high:.2f})"
        print(f"{row['pass']:20} {row['neuron']:18} {spread:>28} {speedup:>28}")
    for name, target in TARGETS.items():
        reached = next(r["speedup"] for r in rows if r["pass"] == name and r["neuron"] == COMPILED)
        print(f"{name}: {reached:.1f} x, target {target:.0f} x: {'reached' if reached >= target else 'NOT reached'}")


def draw(rows: list[dict[str, object]], title: str, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = list(TARGETS)
    figure, axes = pyplot.subplots(1, len(names), figsize=(9, 3.2), layout="constrained")
    for axis, name in zip(axes, names, strict=True):
        own = [row for row in rows if row["pass"] == name]
        values = [row["milliseconds"] for row in own]
        errors = [[abs(row["quartiles"][i] - row["milliseconds"]) for row in own] for i in range(2)]
        axis.barh([row["neuron"] for row in own], values, xerr=errors, color=["#9aa5b1", "#2166ac", "#b2182b"])
        for i, row in enumerate(own):
            axis.annotate(f" {row['speedup']:.1f} x", (values[i] + errors[1][i], i), va="center")
        axis.set_title(name)
        axis.set_xlabel("milliseconds (median, quartiles)")
        axis.set_xlim(0, max(row["quartiles"][1] for row in own) * 1.25)
        axis.invert_yaxis()
    figure.suptitle(title)
    temporary = path.with_suffix(".tmp.png")
    figure.savefig(temporary, dpi=150)
    temporary.replace(path)


def write_json(content: dict[str, object], path: Path) -> None:
    temporary = path.with_suffix(".tmp.json")
    temporary.write_text(json.dumps(content, indent=2) + "\n")
    temporary.replace(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="4,32,96,32,32", help="input currents T,B,C,H,W")
    parser.add_argument("--rounds", type=int, default=15, help="times that every contender takes its turn")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--plain-malloc", action="store_true", help="leave the C library's memory management alone")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder for JSON and PNG")
    args = parser.parse_args()
    if args.rounds < 2:
        parser.error(f"--rounds={args.rounds} must be at least 2")
    shape = tuple(int(size) for size in args.shape.split(","))
    reuse = args.device == "cpu" and not args.plain_malloc and keep_freed_memory()

    start = time.perf_counter()
    times = measure(shape, args.rounds, args.device)
    rows = summarise(times)
    threads = torch.get_num_threads()
    print(f"LIF {list(shape)}, float32, {args.device}, {threads} threads, {args.rounds} rounds, ", end="")
    print("freed memory reused" if reuse else "plain malloc")
    print_table(rows)

    name = "lif" if reuse or args.device == "cuda" else "lif_plain_malloc"
    args.out.mkdir(parents=True, exist_ok=True)
    content = {
        "shape": shape,
        "dtype": "float32",
        "device": args.device,
        "threads": threads,
        "freed_memory_reused": reuse,
        "load_average_at_the_end": os.getloadavg(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__}
        | {package: version(package) for package in ("timm-qkformer", "spikingjelly")},
        "rows": rows,
        "seconds": times,
        "total_seconds": time.perf_counter() - start,
    }
    write_json(content, args.out / f"{name}.json")
    draw(rows, f"LIF {list(shape)}, float32, {threads} CPU threads", args.out / f"{name}.png")


if __name__ == "__main__":
    main()
