"""The sections of the page that need no model of the reader's: complexity, parameters, training runs and memory."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
from torch import nn

from ..complexity import attention_complexity, parameter_counts
from ..memory import PAPER_SIDES, AttentionMemory, attention_memory
from ..pictures import save_picture
from .figures import draw_memory
from .markdown import table
from .published import ATTENTION_PARAMETERS, PARAMETERS, TOP1
from .results import Run, Summary, summarize

__all__ = [
    "ABLATIONS",
    "ablation_section",
    "complexity_section",
    "memory_section",
    "other_runs_section",
    "parameters_section",
]

_REAL_MEMORY_SIDE = 70  # larger maps would need gigabytes for Q K^T
ABLATIONS = {
    "ablation_time_steps": ("Table 5: time steps", "Time steps"),
    "ablation_attention": ("Table 6: kinds of attention", "First two stages + last"),
    "ablation_neuron": ("Table 9: neurons", "Neuron"),
}


def complexity_section(quick: bool) -> list[str]:
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
                f"{time}†" if item.paper else "-",
                f"N^{item.operations_n:.2f} D^{item.operations_d:.2f}",
                f"{count.operations:,}",
                f"{space}†" if item.paper else "-",
                f"N^{abs(item.state_n):.2f} D^{abs(item.state_d):.2f}",
                f"{count.state:,}",
            ]
        )
    return [
        "## Table 1: complexity",
        "",
        *table(
            [
                "Attention",
                "Time, published",
                "Operations, fitted",
                f"counted, N = {last.tokens}, D = {last.dim}",
                "Space, published",
                "State, fitted",
                "counted",
            ],
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
    mixes = []
    for mix, (cifar, events) in ATTENTION_PARAMETERS.items():
        attn = _stages(mix)
        mixes.append(
            [
                mix,
                str(cifar),
                f"{_count('qkformer_hst4_384', num_classes=100, attn=attn) / 1e6:.2f}",
                str(events),
                f"{_count('qkformer_hst2_256', attn=attn) / 1e6:.2f}",
            ]
        )
    return [
        "## Table 2: parameters",
        "",
        *table(["Model", "Published (M)", "Measured (M)", "Measured"], rows),
        "",
        "Published: the authors' repository; † the copy's Table 3, which has one figure for CIFAR-10 and CIFAR-100 and "
        "one for CIFAR10-DVS and DVS128 Gesture. `mlp_ratio=4` is what the release trains on DVS128 Gesture. Measured: "
        "parameters of the models as registered here, with their default number of classes unless stated.",
        "",
        "With other kinds of attention in the first two stages and the last:",
        "",
        *table(["Attention", "HST-4-384, published (M)", "measured", "HST-2-256, published (M)", "measured"], mixes),
        "",
        "Published: † the copy's Table 6.",
    ]


def _stages(mix: str) -> tuple[str, str, str]:
    first, _, last = mix.lower().partition(" + ")
    return first, first, last or first


def _count(name: str, **kwargs: Any) -> int:
    model: nn.Module = timm.create_model(name, device="meta", **kwargs)
    return sum(p.numel() for p in model.parameters())


def ablation_section(experiment: str, runs: Sequence[Run]) -> list[str]:
    title, header = ABLATIONS[experiment]
    measured = {summary.variant: summary for summary in summarize(runs, experiment)}
    published = TOP1[experiment]
    rows = [
        [variant, str(published.get(variant, "-")), str(measured.get(variant, "not measured"))]
        for variant in [*published, *(variant for variant in measured if variant not in published)]
    ]
    lines = [f"## {title}", "", *table([header, "Published: CIFAR-100 (%)", "Measured here (%)"], rows), ""]
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
    experiments = list(dict.fromkeys(run.experiment for run in runs if run.experiment not in ABLATIONS))
    if not experiments:
        return ["## Trained models", "", "No results of other training runs are in this package."]
    summaries = {experiment: summarize(runs, experiment) for experiment in experiments}
    rows = [[name, summary.variant, str(summary)] for name, found in summaries.items() for summary in found]
    return [
        "## Trained models",
        "",
        *table(["Experiment", "Variant", "Top-1, measured (%)"], rows, left=2),
        "",
        *_provenance([summary for found in summaries.values() for summary in found]),
    ]


def memory_section(picture: Path, quick: bool) -> list[str]:
    sides = (10, 20, 30) if quick else PAPER_SIDES
    points: list[AttentionMemory] = []
    for device, chosen in (
        ("cpu", [side for side in sides if side <= _REAL_MEMORY_SIDE]),
        ("meta", [side for side in sides if side > _REAL_MEMORY_SIDE]),
    ):
        points += attention_memory(sides=chosen, device=device)
    save_picture(draw_memory(points), picture)
    kinds = list(dict.fromkeys(point.kind for point in points))
    by_place = {(point.side, point.kind): point for point in points}
    rows = []
    for side in sides:
        row = [str(side) + ("" if side <= _REAL_MEMORY_SIDE else "‡")]
        for kind in kinds:
            point = by_place[side, kind]
            if kind != "SSA":
                row.append("-" if point.paper_mib is None else f"{point.paper_mib:.2f}†")
            row.append(f"{point.peak_bytes / 2**20:.2f}")
        rows.append(row)
    header = ["sqrt(N)"]
    for kind in kinds:
        header += [*([] if kind == "SSA" else [f"{kind}, published"]), f"{kind}, measured"]
    return [
        "## Table 8 and Fig. 4: memory of attention",
        "",
        *table(header, rows),
        "",
        f"![Memory against the number of tokens]({picture.name})",
        "",
        "MiB, 256 channels, T = 1, batch 1, float32. Published: † the copy's Table 9, on a GPU. Measured: the most "
        "bytes of tensors alive at once beyond Q, K and V; ‡ counted with tensors that have a shape and no storage, "
        "which gives the same where both are possible. SSA is published as (Q K^T) V; the release and this package "
        "run it as Q (K^T V), without a matrix of N x N.",
    ]
