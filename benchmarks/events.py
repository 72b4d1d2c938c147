"""Event-driven convolutions against dense ones: one layer at a time, at rising firing rates, in one run.

    python benchmarks/events.py [--rounds 7] [--out benchmarks/results]

Layers are QKFormer-10-768's at 224 px, T = 4. Contenders take turns within every round. See benchmarks/README.md.
"""

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from _common import OURS, argument_parser, environment, ratios, save_figure, take_turns, write_json
from timm_qkformer.inference.projection import Projection
from timm_qkformer.inference.weights import Folded

RATES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 1.0)
LAYERS = {  # input [M, H, W, C], output channels, side of the kernel
    "MLP, 768 to 3072": ((4, 1, 196, 768), 3072, 1),
    "MLP, 3072 to 768": ((4, 1, 196, 3072), 768, 1),
    "3x3, 384 to 768": ((4, 28, 28, 384), 768, 3),
    "3x3, 96 to 192": ((4, 112, 112, 96), 192, 3),
}
PRECISIONS = {"fp32": torch.float32, "int8": torch.int8}


def make(channels: int, outputs: int, side: int, dtype: torch.dtype, events: bool) -> Projection:
    weight = torch.randn(outputs, channels, side, side, dtype=torch.float64)
    projection = Projection([Folded(weight, torch.zeros(outputs, dtype=torch.float64))], 1, 1, dtype)
    projection.events = events
    return projection


def contenders(layer: tuple[Any, ...], rate: float) -> dict[str, Callable[[], Tensor]]:
    shape, outputs, side = layer
    spikes = (torch.rand(shape) < rate).to(torch.uint8)
    runs: dict[str, Callable[[], Tensor]] = {}
    for precision, dtype in PRECISIONS.items():
        torch.manual_seed(0)
        events = make(shape[-1], outputs, side, dtype, True)
        dense = make(shape[-1], outputs, side, dtype, False)
        dense.load_state_dict(events.state_dict())
        x = spikes if dtype == torch.int8 else spikes.float()  # as the model keeps them for dense products
        if not torch.allclose(events(spikes), dense(x), rtol=1e-3, atol=1e-3 * shape[-1] ** 0.5):
            raise SystemExit(f"{precision}: event-driven and dense currents differ")
        runs[f"{precision}, events"] = partial(events, spikes)
        runs[f"{precision}, dense"] = partial(dense, x)
    return runs


@torch.no_grad()
def measure(rounds: int) -> dict[str, dict[str, list[float]]]:
    """Median of the rounds' ratios of dense to event-driven time, for each layer and precision, by firing rate."""
    gains: dict[str, dict[str, list[float]]] = {}
    print(f"{'how many times as fast as dense':32}" + "".join(f"{rate:>9.0%}" for rate in RATES) + "  fire")
    for name, layer in LAYERS.items():
        gains[name] = {precision: [] for precision in PRECISIONS}
        for rate in RATES:
            times = take_turns(contenders(layer, rate), rounds, warm_up=1)
            for precision in PRECISIONS:
                gain = ratios(times[f"{precision}, dense"], times[f"{precision}, events"])
                gains[name][precision].append(gain.median)
        for precision, row in gains[name].items():
            print(f"{name + ', ' + precision:32}" + "".join(f"{gain:>9.2f}" for gain in row))
    return gains


def draw(gains: dict[str, dict[str, list[float]]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.4 * len(gains), 3.4), layout="constrained")
    for axis, (name, rows) in zip(figure.subplots(1, len(gains), sharey=True), gains.items(), strict=True):
        for (precision, row), line in zip(rows.items(), ("o-", "s--"), strict=True):
            axis.plot(RATES, row, line, color=OURS, label=precision)
        axis.axhline(1.0, color="grey", linewidth=0.8)
        axis.set(title=name, xlabel="firing rate of the input", xscale="log", yscale="log")
    figure.axes[0].set_ylabel("dense time / event-driven time")
    figure.axes[0].legend()
    figure.suptitle(f"Event-driven against dense convolutions, {torch.get_num_threads()} CPU threads")
    save_figure(figure, path)


def main() -> None:
    parser = argument_parser(__doc__, rounds=7)
    args = parser.parse_args()
    start = time.perf_counter()
    gains = measure(args.rounds)
    args.out.mkdir(parents=True, exist_ok=True)
    content = {"rates": RATES, "gains": gains, "rounds": args.rounds, **environment("timm")}
    write_json({**content, "total_seconds": time.perf_counter() - start}, args.out / "events.json")
    draw(gains, args.out / "events.png")


if __name__ == "__main__":
    main()
