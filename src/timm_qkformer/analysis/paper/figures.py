"""Figures of the paper that are curves."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..memory import AttentionMemory

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["draw_memory"]

_STYLES = {"QKTA": ("-", "o"), "SSA": ("--", "s"), "SSA as (Q K^T) V": (":", "^")}


def draw_memory(points: Sequence[AttentionMemory]) -> "Figure":
    """Memory of attention against the side of the token map, as in the paper's Fig. 4: lines ours, crosses theirs."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.0, 4.2), layout="constrained")
    axis = figure.subplots()
    for kind, (line, marker) in _STYLES.items():
        own = [point for point in points if point.kind == kind]
        axis.plot(
            [point.side for point in own],
            [point.peak_bytes / 2**20 for point in own],
            line,
            marker=marker,
            markersize=4,
            color="black",
            markerfacecolor="white",
            label=f"{kind}, measured",
        )
    theirs = [(point.side, point.paper_mib) for point in points if point.paper_mib is not None]
    axis.plot(*zip(*theirs, strict=True), "x", color="0.5", label="published, on a GPU") if theirs else None
    axis.set_yscale("log")
    axis.set_xlabel(r"side of the token map, $\sqrt{N}$")
    axis.set_ylabel("peak memory beyond Q, K and V (MiB)")
    axis.set_title("Memory of attention: 256 channels, T = 1, batch 1, float32", fontsize=10)
    axis.grid(True, which="major", color="0.85", linewidth=0.6)
    axis.legend(fontsize=8)
    return figure
