"""Draw what the other modules recorded and measured. Needs matplotlib: pip install 'timm-qkformer[analysis]'.

Every function takes plain arrays or results and returns a matplotlib Figure, made without pyplot: no window, no global
state, no backend to choose. White is 1 and black is 0, as in the paper's Fig. 3; heat maps get lighter as values rise,
also when printed in grey. The same input gives the same bytes.
"""

from collections.abc import Sequence
from pathlib import Path
from textwrap import wrap
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..files import replacing
from .attention import AttentionRecord
from .energy import Energy
from .names import place_of
from .rates import FiringRates

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Array = NDArray[Any]

MAX_STEPS = 8  # columns of a picture over time; longer clips are shown at evenly spaced steps
MAX_HEADS = 16
QUERY_KEY = "query-key"  # among the pictures of `draw_attention`, beside names of layers
_SHADES = ("0.15", "0.45", "0.65", "0.85")  # told apart in grey, too
_MATRIX = {"cmap": "gray", "aspect": "auto", "interpolation": "nearest"}


def draw_attention(records: Sequence[AttentionRecord], pictures: Array, title: str = "") -> "dict[str, Figure]":
    """The main view of each layer under its name and, under `QUERY_KEY`, one picture of what masks do, as in Fig. 3.

    Args:
        records: Of a batch of one; those without a mask are not on that picture.
        pictures: The sample, [1, S, H, W, 3], see `input_pictures`.
        title: First line of every picture's title.
    """
    figures = {
        record.name: draw_channel_masks(record, title=title)
        if record.main_view == "channels"
        else draw_token_masks(record, pictures, title=title)
        for record in records
    }
    with_mask = [record for record in records if record.mask is not None]
    if with_mask:
        step = with_mask[0].time_steps // 2  # at the first step, starting from rest, few neurons fire
        figures[QUERY_KEY] = draw_query_key(with_mask, step=step, title=title)
    return figures


def draw_token_masks(record: AttentionRecord, pictures: Array, sample: int = 0, title: str = "") -> "Figure":
    """How much each token counts: one row for each head, one column for each time step, and their means.

    The first row is the input, tinted where tokens count, the more so the more heads keep them.

    Args:
        record: From `record_attention`; the values are its view "tokens".
        pictures: The input from `input_pictures`, [B, S, H, W, 3].
        sample: Which of the batch to draw.
        title: First line of the title, such as the model's name and where its weights come from.
    """
    values = record.views.tokens[:, sample]  # [T, heads, H, W]
    H, W = values.shape[2:]
    scale = _scale(record, "tokens", values)
    steps, heads = _some(record.time_steps, MAX_STEPS), _some(record.heads, MAX_HEADS)
    figure, axes = _grid(2 + len(heads), 1 + len(steps), (1.15, 1.15 * _aspect(values)))
    image = {"extent": (-0.5, W - 0.5, H - 0.5, -0.5), "interpolation": "nearest"}  # in tokens, first row on top
    for column, step in enumerate([None, *steps]):
        shown = values.mean(0) if step is None else values[step]  # [heads, H, W]
        top_axis, *axes_below = axes[:, column]
        top_axis.imshow(_picture(pictures[sample], step), **image)
        if step is not None:
            tint = np.broadcast_to(np.array([1.0, 0.55, 0.0, 0.0]), (H, W, 4)).copy()
            tint[..., 3] = 0.8 * (shown.mean(0) / scale["vmax"]).clip(0.0)
            top_axis.imshow(tint, **image)
        top_axis.set_title("input;\nmean over t" if step is None else f"t = {step + 1}", fontsize=9)
        for axis, values_of in zip(axes_below, [shown.mean(0), *shown[heads]], strict=True):
            drawn = axis.imshow(values_of, **scale)
    for axis, name in zip(axes[:, 0], ["input", "mean of\nall heads", *(f"head {h + 1}" for h in heads)], strict=True):
        axis.set_ylabel(name, fontsize=9)
    last = axes[-1, 0]
    last.set(xticks=_ends(W), yticks=_ends(H))
    last.tick_params(labelsize=8)
    last.set_xlabel("token column", fontsize=8)
    last.set_ylabel(f"head {heads[-1] + 1}\ntoken row", fontsize=9)
    _colour_bar(figure, drawn, record.labels["tokens"])
    _titled(figure, title, f"{_place(record)}{_left_out(record, steps, heads)}")
    return figure


def draw_channel_masks(record: AttentionRecord, sample: int = 0, title: str = "") -> "Figure":
    """How much each channel counts, one panel for each time step and one for their mean: heads down, channels across.

    The values are the record's view "channels". Arguments as in `draw_token_masks`.
    """
    values = record.views.channels[:, sample]  # [T, heads, channels]
    heads, channels = values.shape[1:]
    steps = _some(record.time_steps, MAX_STEPS)
    figure, axes = _grid(1 + len(steps), 1, (6.0, 0.2 + 0.1 * heads))
    image = {**_scale(record, "channels", values), "extent": (-0.5, channels - 0.5, heads + 0.5, 0.5), "aspect": "auto"}
    for axis, step in zip(axes[:, 0], [None, *steps], strict=True):
        drawn = axis.imshow(values.mean(0) if step is None else values[step], **image)
        axis.set_ylabel("mean over t" if step is None else f"t = {step + 1}", fontsize=9)
    last = axes[-1, 0]
    last.set_ylabel(f"t = {steps[-1] + 1}\nhead", fontsize=9)
    last.set(xticks=_ends(channels), yticks=[1, heads] if heads > 1 else [1])
    last.set_xlabel("channel of the head", fontsize=9)
    last.tick_params(labelsize=8)
    _colour_bar(figure, drawn, record.labels["channels"])
    _titled(figure, title, f"{_place(record)}{_left_out(record, steps, range(heads))}")
    return figure


def draw_query_key(
    records: Sequence[AttentionRecord],
    sample: int = 0,
    step: int = 0,
    head: int | None = None,
    tokens: int = 100,
    title: str = "",
) -> "Figure":
    """Inputs, mask and result of one head as black and white matrices: Q, mask, K and X', as in the paper's Fig. 3.

    Channels down, tokens across, counted row by row. Where there are more tokens, a segment from the middle is shown.

    Args:
        records: Layers to show side by side, each with a mask.
        sample: Which of the batch to draw.
        step: Time step, from 0.
        head: Head, from 0. None: in each layer the one whose mask is nearest to keeping half, since a mask that keeps
            all or nothing shows nothing.
        tokens: Length of the segment.
        title: First line of the title.

    Raises:
        ValueError: For no layer, one without a mask (such as self-attention), or a step or head that is not there.
    """
    if not records or any(record.mask is None for record in records):
        raise ValueError("draw_query_key needs layers with a mask, and spiking self-attention, for one, has no mask")
    shortest = min(record.time_steps for record in records)
    if not 0 <= step < shortest:
        raise ValueError(f"step={step} must be from 0 to {shortest - 1}")
    count = 2 + max(len(record.inputs) for record in records)
    figure = _figure(max(4.0 * len(records), 6.0), 6.5)
    axes = figure.subplots(count, len(records), squeeze=False, height_ratios=(5, 1, *[5] * (count - 2)))
    for column, record in enumerate(records):
        assert record.mask is not None
        mask_name, mask = record.mask
        chosen = _mixed_head(mask[step, sample]) if head is None else head
        if not 0 <= chosen < record.heads:
            raise ValueError(f"head={head} must be from 0 to {record.heads - 1} in {record.name}")
        (first_name, first), *others = record.inputs.items()
        parts = [(first_name, first), (mask_name, mask), *others, (record.result_name, record.result)]
        _draw_matrices(axes[:, column], [(name, part[step, sample, chosen]) for name, part in parts], tokens, column)
        last = axes[len(parts) - 1, column]
        last.set_xlabel(f"{last.get_xlabel()}\n{_place(record)}\nhead {chosen + 1}, t = {step + 1}", fontsize=9)
    _titled(figure, title, "white: 1 (spike), black: 0 or less; rates over all tokens of the head")
    return figure


def _draw_matrices(axes: Any, parts: Sequence[tuple[str, Array]], tokens: int, column: int) -> None:
    """Spikes of one head [channels or 1, H or 1, W or 1], one below the other: a segment of the tokens of each."""
    size = parts[-1][1].shape[1:]
    count = size[0] * size[1]
    first = max((count - tokens) // 2, 0)
    end = min(first + tokens, count)
    for axis, (name, spikes) in zip(axes, parts, strict=False):
        matrix = np.broadcast_to(spikes, (len(spikes), *size)).reshape(len(spikes), -1)[:, first:end]
        rows = len(matrix)
        low, high = min(0.0, float(spikes.min())), max(1.0, float(spikes.max()))
        axis.imshow(matrix, vmin=low, vmax=high, extent=(first - 0.5, end - 0.5, rows - 0.5, -0.5), **_MATRIX)
        symbol = name.upper() if name.islower() else name
        axis.set_title(f"${symbol}$   firing rate {float((spikes != 0).mean()):.3f}", fontsize=9, pad=2, loc="left")
        axis.tick_params(labelsize=8, labelbottom=False)
        axis.set_yticks(_ends(rows) if rows > 1 else [])
        if column == 0 and rows > 1:
            axis.set_ylabel("channel", fontsize=9)
    for unused in axes[len(parts) :]:
        unused.set_axis_off()
    last = axes[len(parts) - 1]
    last.tick_params(labelbottom=True)
    last.set_xlabel(f"token, {first} to {end - 1} of {count}")


def draw_raster(spikes: Array, rows: Array, total: int, name: str, title: str = "") -> "Figure":
    """Spikes of single neurons of a layer over time, below their firing rate; arguments from `pick_neurons`."""
    neurons, steps = spikes.shape
    figure = _figure(max(4.5, 2.0 + 0.35 * steps), 6.0)
    below, above = figure.subplots(2, 1, sharex=True, height_ratios=(5, 1))
    below.imshow(~spikes, vmin=0, vmax=1, extent=(0.5, steps + 0.5, neurons - 0.5, -0.5), **_MATRIX)
    shown = _some(neurons, 6)
    below.set_yticks(shown, [f"{rows[i]:,}" for i in shown], fontsize=8)
    below.set_ylabel(f"neuron: {neurons:,} of {total:,}", fontsize=9)
    for step in range(1, steps):
        below.axvline(step + 0.5, color="0.75", linewidth=0.5)
    above.bar(np.arange(1, steps + 1), spikes.mean(0), color="0.35", width=0.8)
    above.set_ylabel("firing rate", fontsize=9)
    above.set_ylim(0, max(1e-3, float(spikes.mean(0).max()) * 1.15))
    above.set_xlabel("time step", fontsize=9)
    every = max(1, -(-steps // 16))
    above.set_xticks(np.arange(1, steps + 1, every))
    above.tick_params(labelsize=8)
    _titled(figure, title, f"{name}: black is a spike")
    return figure


def draw_gallery(pictures: Sequence[Array], records: Sequence[Sequence[AttentionRecord]], title: str = "") -> "Figure":
    """Many inputs, one to a row, beside what each attention layer makes of them: means over heads and time steps.

    Args:
        pictures: The inputs, each [S, H, W, 3]; a clip is shown as the mean of its frames.
        records: For each input the same layers, recorded with that input alone.
        title: First line of the title.
    """
    layers = records[0]
    maps = [[record.views.tokens[:, 0].mean((0, 1)) for record in own] for own in records]
    scales = [_scale(layer, "tokens", np.stack([row[i] for row in maps])) for i, layer in enumerate(layers)]
    figure, axes = _grid(len(pictures), 1 + len(layers), (1.3, 1.3 * _aspect(layers[0].result)), below=0.7)
    for own_axes, picture, own in zip(axes, pictures, maps, strict=True):
        own_axes[0].imshow(_picture(picture, None), interpolation="nearest")
        for axis, values, scale in zip(own_axes[1:], own, scales, strict=True):
            axis.imshow(values, **scale)
    axes[0, 0].set_title("input", fontsize=9)
    for column, layer in enumerate(layers, start=1):
        axes[0, column].set_title(f"{place_of(layer.name)[0] or layer.name}\n{layer.operator.upper()}", fontsize=9)
        box = axes[-1, column].get_position()
        _colour_bar(figure, axes[-1, column].images[0], "", left=box.x0 + 0.1 * box.width, width=0.8 * box.width)
    labels = dict.fromkeys(layer.labels["tokens"] for layer in layers)
    _titled(figure, title, f"means over heads and time steps of: {' / '.join(labels)}")
    return figure


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
        place = layer.place or layer.path
        part = parts.setdefault(place, {})
        part[layer.input] = part.get(layer.input, 0.0) + layer.pj * 1e-6
        ann[place] = ann.get(place, 0.0) + layer.flops * energy.mac_pj * 1e-6
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


def draw_steps(probabilities: Array, names: Sequence[str], limit: int = 10) -> "Figure":
    """How a model's answer grows: the probability of each class [T, classes] after each time step.

    Drawn are the classes that are most probable at the end, at most `limit`; `names` are those of all classes.
    """
    figure = _figure(5.0, 3.0)
    axis = figure.subplots()
    steps = np.arange(1, len(probabilities) + 1)
    for place, index in enumerate(np.argsort(-probabilities[-1])[:limit]):
        shade, width = ("black", 2.0) if place == 0 else (_SHADES[min(place, 3)], 1.0)
        axis.plot(steps, probabilities[:, index], color=shade, linewidth=width, marker="o", markersize=3)
        if place < 3:
            end = (steps[-1], probabilities[-1, index])
            axis.annotate(_literal(names[index]), end, (5, 0), textcoords="offset points", va="center", fontsize=9)
    axis.set(xlabel="time step", ylabel="probability", ylim=(-0.03, 1.03), xticks=steps)
    axis.grid(color="0.9", linewidth=0.6)
    return figure


def save_picture(figure: "Figure", path: Path, dpi: int = 100) -> Path:
    """Write a figure as PNG, complete or not at all; a file of that name is replaced."""
    with replacing(path) as file:
        figure.savefig(file, format="png", dpi=dpi, metadata={"Software": None})
    return path


def _figure(width: float, height: float) -> "Figure":
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _grid(rows: int, columns: int, cell: tuple[float, float], below: float = 1.0) -> tuple["Figure", Any]:
    """Axes of (width, height) inches each, with room for a title above and a colour bar of `below` inches underneath.

    matplotlib's own layout of so many axes would take several seconds.
    """
    from matplotlib.figure import Figure

    left, right, above, gap = 0.85, 0.2, 0.95, 0.08
    width = left + columns * (cell[0] + gap) + right
    height = above + rows * (cell[1] + gap) + below
    figure = Figure(figsize=(max(width, 5.0), height))
    axes = figure.subplots(
        rows,
        columns,
        squeeze=False,
        gridspec_kw={
            "left": left / figure.get_figwidth(),
            "right": (width - right) / figure.get_figwidth(),
            "bottom": below / height,
            "top": 1.0 - above / height,
            "wspace": gap / cell[0],
            "hspace": gap / cell[1],
        },
    )
    for axis in axes.flat:
        axis.set_xticks([])
        axis.set_yticks([])
    return figure, axes


def _rows(rows: int, title: str) -> tuple["Figure", Any]:
    figure = _figure(8.5, 1.4 + 0.19 * rows)
    axis = figure.subplots()
    if title:
        figure.suptitle(_literal(title), fontsize=10)
    axis.grid(axis="x", color="0.9")
    axis.set_axisbelow(True)
    return figure, axis


def _legend(axis: Any) -> None:
    axis.legend(loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=6, fontsize=8, frameon=False)


def _labels(axis: Any, names: Sequence[str]) -> None:
    axis.set_yticks(range(len(names)), names, fontsize=7.5)
    axis.set_ylim(len(names) - 0.4, -0.6)
    axis.tick_params(axis="x", labelsize=8)


def _titled(figure: "Figure", title: str, line: str) -> None:
    columns = int(13 * figure.get_figwidth())  # characters of this size that fit
    lines = [
        part for text in (_literal(title), line) for paragraph in text.split("\n") for part in wrap(paragraph, columns)
    ]
    if figure.get_layout_engine() is None:
        figure.suptitle("\n".join(lines), fontsize=10, y=1.0 - 0.05 / figure.get_figheight(), va="top")
    else:
        figure.suptitle("\n".join(lines), fontsize=10)


def _literal(title: str) -> str:
    """Titles hold names of files, whose dollar signs are no formulas."""
    return title.replace("$", r"\$")


def _colour_bar(figure: "Figure", drawn: Any, label: str, left: float = 0.2, width: float = 0.6) -> None:
    """A horizontal colour bar at the bottom; `left` and `width` are parts of the figure's width."""
    height = figure.get_figheight()
    bar = figure.colorbar(
        drawn, cax=figure.add_axes((left, 0.45 / height, width, 0.1 / height)), orientation="horizontal"
    )
    bar.set_label("\n".join(wrap(label, int(14 * figure.get_figwidth()))), fontsize=9)
    bar.ax.tick_params(labelsize=8)
    bar.ax.locator_params(nbins=5 if width > 0.4 else 2)


def _scale(record: AttentionRecord, view: str, values: Array) -> dict[str, Any]:
    """What is drawn black and white: 0 and 1 in a mask of spikes, elsewhere 0, or less, and the largest value."""
    is_mask = view == record.main_view and record.mask is not None and record.mask[1].dtype == bool
    top = 1.0 if is_mask else max(float(values.max()), 1e-6)
    return {"cmap": "gray", "vmin": min(0.0, float(values.min())), "vmax": top, "interpolation": "nearest"}


def _ends(size: int) -> list[int]:
    """Ticks at the first and last of so many."""
    return [0, size - 1] if size > 1 else [0]


def _aspect(maps: Array) -> float:
    """Height over width of maps [..., H, W], within what is good for a grid of them."""
    return float(np.clip(maps.shape[-2] / maps.shape[-1], 0.4, 2.0))


def _some(total: int, limit: int) -> list[int]:
    """At most `limit` of 0 to total - 1, evenly spaced, first and last among them."""
    return sorted(set(np.linspace(0, total - 1, min(total, limit)).round().astype(int).tolist()))


def _picture(pictures: Array, step: int | None) -> Array:
    """One frame of [S, H, W, 3], or the mean of all."""
    return pictures.mean(0) if step is None or len(pictures) == 1 else pictures[step]


def _place(record: AttentionRecord) -> str:
    return f"{place_of(record.name)[0] or record.name}: {record.operator.upper()}"


def _left_out(record: AttentionRecord, steps: Sequence[int], heads: Sequence[int]) -> str:
    """What a picture does not show."""
    shown = []
    if len(steps) < record.time_steps:
        shown.append(f"{len(steps)} of {record.time_steps} time steps")
    if len(heads) < record.heads:
        shown.append(f"{len(heads)} of {record.heads} heads")
    return f"\n({' and '.join(shown)}; means over all)" if shown else ""


def _mixed_head(mask: Array) -> int:
    """The head, of a mask [heads, ...], that keeps nearest to half."""
    return int(np.abs(mask.reshape(len(mask), -1).mean(1) - 0.5).argmin())
