"""The sections of the page that need no model of the reader's: complexity, parameters, training runs and memory."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import timm
from torch import nn

from ..analysis.complexity import attention_complexity, parameter_counts
from ..analysis.drawing import save_picture
from ..analysis.memory import PAPER_MEMORY, PAPER_SIDES, AttentionMemory, attention_memory
from .published import ATTENTION_PARAMETERS, COPY, PARAMETERS, TOP1
from .results import Run, Summary, summarize

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_REAL_MEMORY_SIDE = 70  # larger maps would need gigabytes for Q K^T
ABLATIONS = {
    "ablation_time_steps": ("Table 5: time steps", "Time steps"),
    "ablation_attention": ("Table 6: kinds of attention", "First two stages + last"),
    "ablation_neuron": ("Table 9: neurons", "Neuron"),
    "ablation_patch_embed": ("Table 4: patch embedding", "Embedding"),
    "ablation_shortcut": ("Shortcuts of spikes (SEW) or of membrane potentials (MS)", "Shortcut"),
    "ablation_coupling": ("Self-attention per sample, or coupled over the batch as released", "Training"),
}


def table(header: str, rows: Sequence[Sequence[str]], left: int = 1) -> list[str]:
    """A Markdown table under a header such as "Name | Value"; all columns but the first `left` are numbers."""
    rule = ["---" if i < left else "--:" for i in range(header.count("|") + 1)]
    return [f"| {header} |", *(f"| {' | '.join(row)} |" for row in (rule, *rows))]


def complexity_section(quick: bool) -> list[str]:
    """Table 1: complexity of attention."""
    sizes: dict[str, Any] = {"tokens": (16, 64), "dims": (8, 32)} if quick else {}
    found = attention_complexity(**sizes)
    last = found[0].counts[-1]
    rows = []
    for item in found:
        time, space = item.paper or ("-", "-")
        count = item.counts[-1]
        rows.append(
            [
                item.kind,
                f"{time}{COPY}" if item.paper else "-",
                f"N^{item.operations_n:.2f} D^{item.operations_d:.2f}",
                f"{count.operations:,}",
                f"{space}{COPY}" if item.paper else "-",
                f"N^{abs(item.state_n):.2f} D^{abs(item.state_d):.2f}",
                f"{count.state:,}",
            ]
        )
    return [
        "## Table 1: complexity",
        "",
        *table(
            f"Attention | Time, published | Operations, fitted | counted, N = {last.tokens}, D = {last.dim} | "
            "Space, published | State, fitted | counted",
            rows,
            left=2,
        ),
        "",
        f"Published: † the copy's Table 1. Measured: scalar operations between Q, K, V and X', counted for "
        f"{len(found[0].counts)} pairs of N (tokens) and D (channels), one head; exponents fitted by least squares. "
        "State is what stands between the queries and X': the attention vector, K^T V or Q K^T.",
        "",
        "The paper's O(D) and O(N) take the masking of a row or column for one operation; operation by operation it "
        "states O(N D), which is what is found. SSA is published as (Q K^T) V; the release and this package compute "
        "Q (K^T V), which is linear in N.",
    ]


def parameters_section() -> list[str]:
    """Table 2: parameters."""
    rows = [
        [f"`{name}`", str(PARAMETERS.get(name, "-")), f"{count / 1e6:.2f}", f"{count:,}"]
        for name, count in parameter_counts().items()
        if not name.startswith("test_")
    ]
    for name, args in (
        ("qkformer_hst4_384", {"num_classes": 100}),
        ("qkformer_hst2_256", {"num_classes": 11, "mlp_ratio": 4.0}),
    ):
        count = _count(name, **args)
        given = ", ".join(f"{key}={value:g}" for key, value in args.items())
        rows.append([f"`{name}`, {given}", str(PARAMETERS[name]), f"{count / 1e6:.2f}", f"{count:,}"])
    cifar, events = ATTENTION_PARAMETERS.values()
    mixes = []
    for mix in cifar:
        first, _, last = mix.lower().partition(" + ")
        attn = (first, first, last or first)
        ours = _count("qkformer_hst4_384", num_classes=100, attn=attn), _count("qkformer_hst2_256", attn=attn)
        mixes.append([mix, str(cifar[mix]), f"{ours[0] / 1e6:.2f}", str(events[mix]), f"{ours[1] / 1e6:.2f}"])
    return [
        "## Table 2: parameters",
        "",
        *table("Model | Published (M) | Measured (M) | Measured", rows),
        "",
        "Published: the authors' repository; † the copy's Table 3, which has one figure for CIFAR-10 and CIFAR-100 and "
        "one for CIFAR10-DVS and DVS128 Gesture. `mlp_ratio=4` is what the release trains on DVS128 Gesture. Measured: "
        "parameters of the models as registered here, with their default number of classes unless stated.",
        "",
        "With other kinds of attention in the first two stages and the last:",
        "",
        *table("Attention | HST-4-384, published (M) | measured | HST-2-256, published (M) | measured", mixes),
        "",
        "Published: † the copy's Table 6.",
    ]


def _count(name: str, **kwargs: Any) -> int:
    model: nn.Module = timm.create_model(name, device="meta", **kwargs)
    return sum(p.numel() for p in model.parameters())


def ablation_section(experiment: str, runs: Sequence[Run]) -> list[str]:
    """Tables 4, 5, 6 and 9, and two comparisons that the paper does not make: ablations."""
    title, header = ABLATIONS[experiment]
    measured = {summary.variant: summary for summary in summarize(runs, experiment)}
    published = TOP1.get(experiment, {})
    rows = [
        [variant, str(published.get(variant, "-")), str(measured.get(variant, "not measured"))]
        for variant in [*published, *(variant for variant in measured if variant not in published)]
    ]
    lines = [f"## {title}", "", *table(f"{header} | Published: CIFAR-100 (%) | Measured here (%)", rows), ""]
    if published:
        lines.append("Published: † the copy's Tables 6 and 7; HST-4-384, 400 epochs.")
    if measured:
        lines += [
            "",
            "Measured: at small scale, on other data and for fewer epochs. The two columns do not compare; what can be "
            "compared is the order within a column, as far as the spread (sample standard deviation) allows.",
            "",
            *_provenance(list(measured.values())),
        ]
    else:
        lines.append("Measured: no results of such runs are in this package.")
    return lines


def _provenance(summaries: Sequence[Summary]) -> list[str]:
    lines = []
    for summary in summaries:
        run = summary.runs[0]
        seeds = ", ".join(str(run.seed) for run in summary.runs)
        minutes = sum(run.seconds for run in summary.runs) / len(summary.runs) / 60
        lines.append(
            f"- {summary.variant}: {run.epochs} epochs, {minutes:.0f} min a run, seeds {seeds}: `{run.command}`"
        )
    return lines


def other_runs_section(runs: Sequence[Run]) -> list[str]:
    """Trainings that belong to no table."""
    experiments = list(dict.fromkeys(run.experiment for run in runs if run.experiment not in ABLATIONS))
    if not experiments:
        return ["## Trained models", "", "No results of other training runs are in this package."]
    summaries = {experiment: summarize(runs, experiment) for experiment in experiments}
    rows = [[name, summary.variant, str(summary)] for name, found in summaries.items() for summary in found]
    return [
        "## Trained models",
        "",
        *table("Experiment | Variant | Top-1, measured (%)", rows, left=2),
        "",
        *_provenance([summary for found in summaries.values() for summary in found]),
    ]


def memory_section(picture: Path, quick: bool) -> list[str]:
    """Table 8 and Fig. 4: memory of attention."""
    sides = (10, 20, 30) if quick else PAPER_SIDES
    points: list[AttentionMemory] = []
    for device, chosen in (
        ("cpu", [side for side in sides if side <= _REAL_MEMORY_SIDE]),
        ("meta", [side for side in sides if side > _REAL_MEMORY_SIDE]),
    ):
        points += attention_memory(sides=chosen, device=device)
    save_picture(draw_memory(points), picture)
    kinds = list(dict.fromkeys(point.kind for point in points))
    by_side = {(point.side, point.kind): point for point in points}
    rows = []
    for side in sides:
        row = [str(side) + ("" if side <= _REAL_MEMORY_SIDE else "‡")]
        for kind in kinds:
            point = by_side[side, kind]
            if kind in PAPER_MEMORY:
                row.append("-" if point.paper_mib is None else f"{point.paper_mib:.2f}{COPY}")
            row.append(f"{point.peak_bytes / 2**20:.2f}")
        rows.append(row)
    header = ["sqrt(N)"]
    for kind in kinds:
        header += [*([f"{kind}, published"] if kind in PAPER_MEMORY else []), f"{kind}, measured"]
    return [
        "## Table 8 and Fig. 4: memory of attention",
        "",
        *table(" | ".join(header), rows),
        "",
        f"![Memory against the number of tokens]({picture.name})",
        "",
        "MiB, 256 channels, T = 1, batch 1, float32. Published: † the copy's Table 9, on a GPU. Measured: the most "
        "bytes of tensors alive at once beyond Q, K and V; ‡ counted with tensors that have a shape and no storage, "
        "which gives the same where both are possible. SSA is published as (Q K^T) V; the release and this package "
        "run it as Q (K^T V), without a matrix of N x N.",
    ]


def draw_memory(points: Sequence[AttentionMemory]) -> "Figure":
    """Memory of attention against the side of the token map, as in the paper's Fig. 4: lines ours, crosses theirs."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.0, 4.2), layout="constrained")
    axis = figure.subplots()
    kinds = dict.fromkeys(point.kind for point in points)
    for kind, style in zip(kinds, ("o-", "s--", "^:"), strict=False):
        sides, mib = zip(*((p.side, p.peak_bytes / 2**20) for p in points if p.kind == kind), strict=True)
        axis.plot(sides, mib, style, color="black", markersize=4, markerfacecolor="white", label=f"{kind}, measured")
    theirs = [(point.side, point.paper_mib) for point in points if point.paper_mib is not None]
    axis.plot(*zip(*theirs, strict=True), "x", color="0.5", label="published, on a GPU") if theirs else None
    axis.set_yscale("log")
    axis.set_xlabel(r"side of the token map, $\sqrt{N}$")
    axis.set_ylabel("peak memory beyond Q, K and V (MiB)")
    axis.set_title("Memory of attention: 256 channels, T = 1, batch 1, float32", fontsize=10)
    axis.grid(True, which="major", color="0.85", linewidth=0.6)
    axis.legend(fontsize=8)
    return figure
