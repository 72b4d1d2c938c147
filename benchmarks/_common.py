"""What the benchmarks share: turn-taking, medians and quartiles, memory management, JSON and pictures."""

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from timm_qkformer.devices import processor_name
from timm_qkformer.files import replacing, write_atomically

RESULTS = Path(__file__).parent / "results"


def argument_parser(description: str, rounds: int, least: int = 2) -> argparse.ArgumentParser:
    """With the options that all benchmarks have: how many rounds, and where the results go.

    Args:
        description: The script's docstring, of which the first line is shown.
        rounds: By default.
        least: How few there may be; quartiles need two.
    """

    def number(text: str) -> int:
        if (value := int(text)) < least:
            raise argparse.ArgumentTypeError(f"{value} must be at least {least}")
        return value

    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--rounds", type=number, default=rounds, help="turns of every contender and size (%(default)s)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for JSON and PNG")
    return parser


class Spread(NamedTuple):
    """Median and quartiles."""

    lower: float
    median: float
    upper: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        return cls(*statistics.quantiles(values, n=4))

    def scaled(self, factor: float) -> "Spread":
        return Spread(*(value * factor for value in self))

    def __format__(self, spec: str) -> str:
        return f"{self.median:{spec}} ({self.lower:{spec}} to {self.upper:{spec}})"


def seconds(function: Callable[[], object], device: str = "cpu") -> float:
    """Wall-clock time of one call."""
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    function()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def take_turns(
    contenders: dict[str, Callable[[], object]], rounds: int, device: str = "cpu", warm_up: int = 2
) -> dict[str, list[float]]:
    """Seconds of every contender and round. Everyone runs once in each round, so that whatever else the machine does
    hits all of them; the first `warm_up` rounds do not count."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for i in range(rounds + warm_up):
        for name, run in contenders.items():
            elapsed = seconds(run, device)
            if i >= warm_up:
                times[name].append(elapsed)
    return times


def ratios(reference: Sequence[float], own: Sequence[float]) -> Spread:
    """How many times as fast as the reference: spread of the rounds' ratios."""
    return Spread.of([theirs / mine for theirs, mine in zip(reference, own, strict=True)])


def environment(*packages: str) -> dict[str, Any]:
    """What a result depends on besides the code, for its JSON."""
    return {
        "threads": torch.get_num_threads(),
        "cpu": processor_name(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "load_average_at_the_end": os.getloadavg(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__}
        | {package: version(package) for package in ("timm-qkformer", *packages)},
    }


def write_json(content: dict[str, object], path: Path) -> None:
    write_atomically(path, json.dumps(content, indent=2) + "\n")


def save_figure(figure: Any, path: Path) -> None:
    """Write a matplotlib figure as PNG."""
    with replacing(path) as file:
        figure.savefig(file, dpi=150, format="png")


def spikingjelly_like(ours: Any) -> nn.Module:
    """spikingjelly's QKFormer, which has the ImageNet embedding only, with our widths, heads and depths."""
    from spikingjelly.activation_based.model.qkformer import QKFormer

    theirs: nn.Module = QKFormer(
        T=ours.time_steps,
        num_classes=ours.num_classes,
        embed_dims=ours.num_features,
        num_heads=tuple(stage.blocks[0].attn.num_heads for stage in ours.stages),
        depths=tuple(len(stage.blocks) for stage in ours.stages),
    )
    weights, their_weights = (sum(p.numel() for p in m.parameters() if p.dim() > 1) for m in (ours, theirs))
    if weights != their_weights:
        raise SystemExit(f"not the same network: {weights} weights here, {their_weights} in spikingjelly")
    return theirs


class Bar(NamedTuple):
    """One contender in a panel of a picture."""

    name: str
    spread: Spread
    note: str
    colour: str


OURS, OURS_SLOWER, PEER, ANN = "#2166ac", "#9aa5b1", "#b2182b", "#4d9221"


def draw_bars(panels: dict[str, Sequence[Bar]], unit: str, title: str, path: Path) -> None:
    """One panel of horizontal bars for each title: medians, quartiles and a note at the end of each bar."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    height = 1.6 + 0.4 * max(len(bars) for bars in panels.values())
    figure, axes = pyplot.subplots(1, len(panels), figsize=(max(8.0, 4.5 * len(panels)), height), layout="constrained")
    for axis, (name, bars) in zip([axes] if len(panels) == 1 else axes, panels.items(), strict=True):
        medians = [bar.spread.median for bar in bars]
        errors = [
            [bar.spread.median - bar.spread.lower for bar in bars],
            [bar.spread.upper - bar.spread.median for bar in bars],
        ]
        axis.barh([bar.name for bar in bars], medians, xerr=errors, color=[bar.colour for bar in bars])
        for i, bar in enumerate(bars):
            axis.annotate(f" {bar.note}", (bar.spread.upper, i), va="center")
        axis.set_title(name)
        axis.set_xlabel(f"{unit} (median, quartiles)")
        axis.set_xlim(0, max(bar.spread.upper for bar in bars) * 1.25)
        axis.invert_yaxis()
    figure.suptitle(title)
    save_figure(figure, path)
    pyplot.close(figure)
