"""The LIF op: ours in eager mode and compiled, beside spikingjelly 2.0's, forward and forward + backward.

    python benchmarks/lif.py [--shape 4,32,96,32,32] [--rounds 15] [--out benchmarks/results]

Contenders take turns within every round, so that whatever else the machine does hits all of them; ratios are medians
of the rounds' ratios. See benchmarks/README.md.
"""

import time
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from _common import (
    OURS,
    OURS_SLOWER,
    PEER,
    Bar,
    Spread,
    argument_parser,
    draw_bars,
    environment,
    ratios,
    take_turns,
    write_json,
)
from timm_qkformer.execution import execution_policy, keep_freed_memory
from timm_qkformer.neurons import LIF

EAGER, COMPILED, SPIKINGJELLY = "ours, eager", "ours, compiled", "spikingjelly 2.0"
COLOURS = {EAGER: OURS_SLOWER, COMPILED: OURS, SPIKINGJELLY: PEER}
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
            with execution_policy(neurons=name):
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


def check_that_they_agree(neurons: dict[str, Callable[[Tensor], Tensor]], x: Tensor, grad: Tensor) -> None:
    step = passes(x, grad)
    spikes = {name: step["forward"](neuron) for name, neuron in neurons.items()}
    grads = {name: step["forward + backward"](neuron)[0] for name, neuron in neurons.items()}
    for name in neurons:
        if not torch.equal(spikes[name], spikes[EAGER]):
            raise SystemExit(f"{name}: spikes differ from those of {EAGER}")
        torch.testing.assert_close(grads[name], grads[EAGER], rtol=1e-4, atol=1e-5)


def measure(shape: tuple[int, ...], rounds: int, device: str) -> dict[str, dict[str, list[float]]]:
    """Seconds of every pass, contender and round."""
    torch.manual_seed(0)
    x = torch.randn(shape, device=device) * 2.0
    grad = torch.randn(shape, device=device)
    neurons = contenders(device)
    check_that_they_agree(neurons, x, grad)
    return {
        name: take_turns({neuron: partial(step, run) for neuron, run in neurons.items()}, rounds, device)
        for name, step in passes(x, grad).items()
    }


class Row(NamedTuple):
    """What a table's line says."""

    neuron: str
    milliseconds: Spread
    speedup: Spread  # against spikingjelly


def summarise(times: dict[str, list[float]]) -> list[Row]:
    return [
        Row(neuron, Spread.of(values).scaled(1e3), ratios(times[SPIKINGJELLY], values))
        for neuron, values in times.items()
    ]


def print_table(passes: dict[str, list[Row]]) -> None:
    print(f"{'pass':20} {'neuron':18} {'ms (quartiles)':>28} {'against spikingjelly 2.0':>28}")
    for name, rows in passes.items():
        for row in rows:
            print(f"{name:20} {row.neuron:18} {f'{row.milliseconds:.2f}':>28} {f'{row.speedup:.2f}':>28}")
    for name, target in TARGETS.items():
        reached = next(row.speedup.median for row in passes[name] if row.neuron == COMPILED)
        print(f"{name}: {reached:.1f} x, target {target:.0f} x: {'reached' if reached >= target else 'NOT reached'}")


def main() -> None:
    parser = argument_parser(__doc__, rounds=15)
    parser.add_argument("--shape", default="4,32,96,32,32", help="input currents T,B,C,H,W")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--plain-malloc", action="store_true", help="leave the C library's memory management alone")
    args = parser.parse_args()
    shape = tuple(int(size) for size in args.shape.split(","))
    reuse = args.device == "cpu" and not args.plain_malloc and keep_freed_memory()

    start = time.perf_counter()
    times = measure(shape, args.rounds, args.device)
    rows = {name: summarise(by_neuron) for name, by_neuron in times.items()}
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
        "freed_memory_reused": reuse,
        **environment("spikingjelly"),
        "rows": {name: [row._asdict() for row in own] for name, own in rows.items()},
        "seconds": times,
        "total_seconds": time.perf_counter() - start,
    }
    write_json(content, args.out / f"{name}.json")
    bars = {
        name: [Bar(row.neuron, row.milliseconds, f"{row.speedup.median:.1f} x", COLOURS[row.neuron]) for row in own]
        for name, own in rows.items()
    }
    draw_bars(bars, "milliseconds", f"LIF {list(shape)}, float32, {threads} CPU threads", args.out / f"{name}.png")


if __name__ == "__main__":
    main()
