"""Bar charts of firing rates and energy. Needs matplotlib: pip install 'timm-qkformer[analysis]'."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from .energy import Energy
from .rates import FiringRates

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["draw_energy", "draw_rates"]

_SHADES = ("0.15", "0.45", "0.65", "0.85")  # told apart in grey, too


def draw_rates(rates: FiringRates, title: str = "") -> "Figure":
    """Mean firing rate of each layer with its standard deviation over the samples, one dot for each time step."""
    figure, axis = _rows(len(rates.layers), title)
    places = range(len(rates.layers))
    axis.barh(
        places,
        [layer.mean for layer in rates.layers],
        xerr=[layer.std for layer in rates.layers],
        color=["0.45" if layer.is_neuron else "0.85" for layer in rates.layers],
        ecolor="black",
        height=0.75,
    )
    if 1 < rates.time_steps <= 16:
        steps = [(rate, place) for place in places for rate in rates.layers[place].step_means]
        axis.plot(*zip(*steps, strict=True), "o", markersize=2.5, color="tab:orange", label="single time steps")
        _legend(axis)
    _labels(axis, [f"{layer.place}: {layer.name}" for layer in rates.layers])
    axis.set_xlabel("spikes per neuron and time step (mean; line: standard deviation over samples)", fontsize=9)
    axis.set_xlim(0, min(1.0, 1.1 * max((max(layer.step_means) for layer in rates.layers), default=1.0) + 0.01))
    return figure


def draw_energy(energy: Energy, title: str = "") -> "Figure":
    """Energy of each part of the model, stacked by what the operations take in, and the ANN's as a line."""
    parts: dict[str, dict[str, float]] = {}
    ann: dict[str, float] = {}
    for layer in energy.layers:
        part = parts.setdefault(layer.place or layer.path, {})
        part[layer.input] = part.get(layer.input, 0.0) + layer.pj * 1e-6
        ann[layer.place or layer.path] = ann.get(layer.place or layer.path, 0.0) + layer.flops * energy.mac_pj * 1e-6
    figure, axis = _rows(len(parts), title)
    kinds = ("spikes", "spike sums", "pixels", "means", "real numbers")
    used = [kind for kind in kinds if any(kind in part for part in parts.values())]
    start = [0.0] * len(parts)
    for kind in used:
        shade = _SHADES[min(kinds.index(kind), len(_SHADES) - 1)]
        widths = [part.get(kind, 0.0) for part in parts.values()]
        axis.barh(range(len(parts)), widths, left=start, height=0.75, color=shade, label=f"input: {kind}")
        start = [left + width for left, width in zip(start, widths, strict=True)]
    axis.plot(list(ann.values()), range(len(parts)), "|", markersize=14, color="tab:orange", label="ANN, once")
    _legend(axis)
    _labels(axis, list(parts))
    axis.set_xlabel(f"energy per sample in µJ ({energy.mac_pj} pJ per MAC, {energy.ac_pj} pJ per addition)", fontsize=9)
    return figure


def _rows(rows: int, title: str) -> tuple["Figure", Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.5, 1.4 + 0.19 * rows), layout="constrained")
    axis = figure.subplots()
    if title:
        figure.suptitle(title, fontsize=10)
    axis.grid(axis="x", color="0.9")
    axis.set_axisbelow(True)
    return figure, axis


def _legend(axis: Any) -> None:
    axis.legend(loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=6, fontsize=8, frameon=False)


def _labels(axis: Any, names: Sequence[str]) -> None:
    axis.set_yticks(range(len(names)), names, fontsize=7.5)
    axis.set_ylim(len(names) - 0.4, -0.6)
    axis.tick_params(axis="x", labelsize=8)
