"""Draw what `attention` and `raster` recorded. Needs matplotlib: pip install 'timm-qkformer[analysis]'.

Every function takes plain arrays and returns a matplotlib Figure, made without pyplot: no window, no global state, no
backend to choose. White is 1 and black is 0, as in the paper's Fig. 3; heat maps get lighter as values rise, also when
printed in grey. The same input gives the same bytes.
"""

from collections.abc import Sequence
from pathlib import Path
from textwrap import wrap
from typing import TYPE_CHECKING, Any, Optional

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from .._files import replacing
from .attention import AttentionRecord
from .names import place_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = [
    "draw_channel_masks",
    "draw_gallery",
    "draw_query_key",
    "draw_raster",
    "draw_token_masks",
    "input_pictures",
    "save_picture",
]

Array = NDArray[Any]

MAX_STEPS = 8  # columns of a picture over time; longer clips are shown at evenly spaced steps
MAX_HEADS = 16
_KIND_NAMES = {"qkta": "Q-K token attention", "qkca": "Q-K channel attention", "ssa": "spiking self-attention"}


def input_pictures(x: Tensor, mean: Sequence[float] = (), std: Sequence[float] = ()) -> Array:
    """A model's input as pictures: float32 [B, S, H, W, 3] between 0 and 1, S = 1 for images and T for clips.

    Two channels are polarities, "off" first: grey where nothing happens, lighter where "on" events outnumber the
    "off" events, darker where they are outnumbered. Three are red, green and blue. Anything else is averaged to grey.

    Args:
        x: Images [B, C, H, W] or clips [B, T, C, H, W], normalised as the model takes them.
        mean, std: What the normalisation subtracted and divided by, one for each channel; empty for none.
    """
    frames = x.detach().cpu().float().numpy()
    if frames.ndim == 4:
        frames = frames[:, None]
    channels = frames.shape[2]
    for name, values in (("mean", mean), ("std", std)):
        if len(values) not in (0, channels):
            raise ValueError(f"{name}={tuple(values)} needs one entry for each of the input's {channels} channels")
    if len(std):
        frames = frames * np.asarray(std, np.float32)[:, None, None]
    if len(mean):
        frames = frames + np.asarray(mean, np.float32)[:, None, None]
    if channels == 2:
        balance = frames[:, :, 1] - frames[:, :, 0]
        largest = np.array([_largest(clip) for clip in balance], np.float32)
        frames = (0.5 + 0.5 * balance / largest[:, None, None, None])[:, :, None]
    elif channels != 3:
        frames = frames.mean(2, keepdims=True)
    pictures = np.broadcast_to(frames, (*frames.shape[:2], 3, *frames.shape[3:])).transpose(0, 1, 3, 4, 2)
    return pictures.clip(0.0, 1.0)


def _largest(balance: Array) -> float:
    """Where the grey scale of a clip ends: almost its largest value, so that one noisy pixel does not darken it all."""
    events = np.abs(balance[balance != 0.0])
    return float(np.quantile(events, 0.98)) if events.size else 1.0


def draw_token_masks(record: AttentionRecord, pictures: Array, sample: int = 0, title: str = "") -> "Figure":
    """How much each token counts: one row for each head, one column for each time step, and their means.

    For QKTA the values are the mask A_t; for the others see `AttentionRecord.token_values`. The first row is the input,
    tinted where tokens count, the more so the more heads keep them.

    Args:
        record: From `record_attention`.
        pictures: The input from `input_pictures`, [B, S, H, W, 3].
        sample: Which of the batch to draw.
        title: First line of the title, such as the model's name and where its weights come from.
    """
    values = record.token_values()[:, sample]  # [T, heads, H, W]
    top = max(float(values.max()), 1e-6) if record.kind == "ssa" else 1.0
    steps, heads = _some(record.time_steps, MAX_STEPS), _some(record.heads, MAX_HEADS)
    figure, axes = _grid(2 + len(heads), 1 + len(steps), (1.15, 1.15 * _aspect(values)))
    extent = (-0.5, values.shape[3] - 0.5, values.shape[2] - 0.5, -0.5)  # in tokens, first row on top
    for column, step in enumerate([None, *steps]):
        shown = values.mean(0) if step is None else values[step]  # [heads, H, W]
        top_axis, *axes_below = axes[:, column]
        top_axis.imshow(_picture(pictures[sample], step), extent=extent, interpolation="nearest")
        if step is not None:
            tint = np.broadcast_to(np.array([1.0, 0.55, 0.0, 0.0]), (*values.shape[2:], 4)).copy()
            tint[..., 3] = 0.8 * shown.mean(0) / top
            top_axis.imshow(tint, extent=extent, interpolation="nearest")
        top_axis.set_title("input;\nmean over t" if step is None else f"t = {step + 1}", fontsize=9)
        for axis, picture in zip(axes_below, [shown.mean(0), *shown[heads]], strict=True):
            drawn = axis.imshow(picture, cmap="gray", vmin=0.0, vmax=top, interpolation="nearest")
    for axis, name in zip(axes[:, 0], ["input", "mean of\nall heads", *(f"head {h + 1}" for h in heads)], strict=True):
        axis.set_ylabel(name, fontsize=9)
    _ticks(axes[-1, 0], values.shape[2:])
    axes[-1, 0].set_xlabel("token column", fontsize=8)
    axes[-1, 0].set_ylabel(f"head {heads[-1] + 1}\ntoken row", fontsize=9)
    _colour_bar(
        figure,
        drawn,
        {
            "qkta": "token mask $A_t$: 1 keeps the token",
            "qkca": "share of the head's channels that fire in $X'$",
            "ssa": "attention received by token j: mean of $s\\,q_i \\cdot k_j$ over all queries i",
        }[record.kind],
    )
    _titled(figure, title, f"{_place(record)}{_left_out(record, steps, heads)}")
    return figure


def draw_channel_masks(record: AttentionRecord, sample: int = 0, title: str = "") -> "Figure":
    """How much each channel counts, one panel for each time step and one for their mean: heads down, channels across.

    For QKCA the values are the mask A_c; for the others see `AttentionRecord.channel_values`. Arguments as in
    `draw_token_masks`.
    """
    values = record.channel_values()[:, sample]  # [T, heads, channels]
    heads, channels = values.shape[1:]
    top = 1.0 if record.kind == "qkca" else max(float(values.max()), 1e-6)
    steps = _some(record.time_steps, MAX_STEPS)
    figure, axes = _grid(1 + len(steps), 1, (6.0, 0.2 + 0.1 * heads))
    for row, step in enumerate([None, *steps]):
        shown = values.mean(0) if step is None else values[step]
        drawn = axes[row, 0].imshow(
            shown,
            cmap="gray",
            vmin=0.0,
            vmax=top,
            aspect="auto",
            interpolation="nearest",
            extent=(-0.5, channels - 0.5, heads + 0.5, 0.5),
        )
        axes[row, 0].set_ylabel("mean over t" if step is None else f"t = {step + 1}", fontsize=9)
    last = axes[-1, 0]
    last.set_ylabel(f"t = {steps[-1] + 1}\nhead", fontsize=9)
    last.set_yticks([1, heads] if heads > 1 else [1])
    last.set_xlabel("channel of the head", fontsize=9)
    last.set_xticks([0, channels - 1] if channels > 1 else [0])
    last.tick_params(labelsize=8)
    label = "mask $A_c$: 1 keeps the channel" if record.kind == "qkca" else "share of tokens at which it fires in $X'$"
    _colour_bar(figure, drawn, label)
    _titled(figure, title, f"{_place(record)}{_left_out(record, steps, range(heads))}")
    return figure


def draw_query_key(
    records: Sequence[AttentionRecord],
    sample: int = 0,
    step: int = 0,
    head: Optional[int] = None,
    tokens: int = 100,
    title: str = "",
) -> "Figure":
    """Q, the mask, K and X' of one head as black and white matrices, as in the paper's Fig. 3.

    Channels down, tokens across, counted row by row. Where there are more tokens, a segment from the middle is shown.

    Args:
        records: Layers to show side by side, of kind "qkta" or "qkca".
        sample: Which of the batch to draw.
        step: Time step, from 0.
        head: Head, from 0. None: in each layer the one whose mask is nearest to keeping half, since a mask that keeps
            all or nothing shows nothing.
        tokens: Length of the segment.
        title: First line of the title.

    Raises:
        ValueError: For no layer, spiking self-attention (which has no mask), or a step or head that is not there.
    """
    if not records or any(record.mask is None for record in records):
        raise ValueError("draw_query_key needs Q-K attention layers: spiking self-attention has no mask")
    shortest = min(record.time_steps for record in records)
    if not 0 <= step < shortest:
        raise ValueError(f"step={step} must be from 0 to {shortest - 1}")
    width = max(4.0 * len(records), 6.0)
    figure = _figure(width, 6.5)
    axes = figure.subplots(4, len(records), squeeze=False, height_ratios=(5, 1, 5, 5))
    for column, record in enumerate(records):
        assert record.mask is not None
        chosen = _mixed_head(record.mask[step, sample]) if head is None else head
        if not 0 <= chosen < record.heads:
            raise ValueError(f"head={head} must be from 0 to {record.heads - 1} in {record.name}")
        q, k, attended = (part[step, sample, chosen] for part in (record.q, record.k, record.attended))
        count = q[0].size
        first = max((count - tokens) // 2, 0)
        segment = slice(first, first + tokens)
        channels = len(q)
        mask = np.broadcast_to(
            record.mask[step, sample, chosen], q.shape if record.kind == "qkca" else (1, *q.shape[1:])
        )
        parts = (("$Q$", q), ("$A_c$" if record.kind == "qkca" else "$A_t$", mask), ("$K$", k), ("$X'$", attended))
        end = min(first + tokens, count)
        for row, (name, spikes) in enumerate(parts):
            axis = axes[row, column]
            axis.imshow(
                spikes.reshape(len(spikes), -1)[:, segment],
                cmap="gray",
                vmin=0,
                vmax=1,
                aspect="auto",
                interpolation="nearest",
                extent=(first - 0.5, end - 0.5, len(spikes) - 0.5, -0.5),
            )
            rate = float(spikes.mean())
            axis.set_title(f"{name}   firing rate {rate:.3f}", fontsize=9, pad=2, loc="left")
            axis.tick_params(labelsize=8)
            axis.set_yticks([0, len(spikes) - 1] if len(spikes) > 1 else [])
            if column == 0 and len(spikes) > 1:
                axis.set_ylabel("channel", fontsize=9)
            if row < 3:
                axis.set_xticklabels([])
        axes[3, column].set_xlabel(
            f"token, {first} to {end - 1} of {count}\n{_place(record)}\nhead {chosen + 1}, "
            f"{channels} channels, t = {step + 1}",
            fontsize=9,
        )
    _titled(figure, title, "white: 1 (spike), black: 0; rates over all tokens of the head")
    return figure


def draw_raster(spikes: Array, rows: Array, total: int, name: str, title: str = "") -> "Figure":
    """Spikes of single neurons over time, above the firing rate of the whole layer.

    Args:
        spikes: bool [neurons, T], from `raster`.
        rows: Index of each of these neurons within its layer.
        total: Neurons in the layer.
        name: Of the layer.
        title: First line of the title.
    """
    neurons, steps = spikes.shape
    figure = _figure(max(4.5, 2.0 + 0.35 * steps), 6.0)
    below, above = figure.subplots(2, 1, sharex=True, height_ratios=(5, 1))
    below.imshow(
        ~spikes,
        cmap="gray",
        vmin=0,
        vmax=1,
        aspect="auto",
        interpolation="nearest",
        extent=(0.5, steps + 0.5, neurons - 0.5, -0.5),
    )
    shown = np.unique(np.linspace(0, neurons - 1, min(neurons, 6)).round().astype(int))
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
    figure, axes = _grid(len(pictures), 1 + len(layers), (1.3, 1.3 * _aspect(layers[0].k)), below=0.7)
    tops = [
        max(float(row[i].token_values().mean((0, 1, 2)).max()) for row in records) if layer.kind == "ssa" else 1.0
        for i, layer in enumerate(layers)
    ]
    for row, (picture, own) in enumerate(zip(pictures, records, strict=True)):
        axes[row, 0].imshow(_picture(picture, None), interpolation="nearest")
        for column, record in enumerate(own, start=1):
            values = record.token_values()[:, 0].mean((0, 1))
            axes[row, column].imshow(values, cmap="gray", vmin=0.0, vmax=max(tops[column - 1], 1e-6))
    for column in range(1, 1 + len(layers)):
        box = axes[-1, column].get_position()
        drawn = axes[-1, column].images[0]
        _colour_bar(figure, drawn, "", left=box.x0 + 0.1 * box.width, width=0.8 * box.width)
    axes[0, 0].set_title("input", fontsize=9)
    for column, layer in enumerate(layers, start=1):
        axes[0, column].set_title(f"{place_of(layer.name)[0] or layer.name}\n{layer.kind.upper()}", fontsize=9)
    kinds = {layer.kind for layer in layers}
    white = {
        "qkta": "kept by more heads at more time steps",
        "qkca": "firing in $X'$",
        "ssa": "receiving more attention",
    }
    _titled(figure, title, "lighter tokens: " + " / ".join(text for kind, text in white.items() if kind in kinds))
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


def _titled(figure: "Figure", title: str, line: str) -> None:
    columns = int(13 * figure.get_figwidth())  # characters of this size that fit
    lines = [part for text in (title, line) for paragraph in text.split("\n") for part in wrap(paragraph, columns)]
    if figure.get_layout_engine() is None:
        figure.suptitle("\n".join(lines), fontsize=10, y=1.0 - 0.05 / figure.get_figheight(), va="top")
    else:
        figure.suptitle("\n".join(lines), fontsize=10)


def _colour_bar(figure: "Figure", drawn: Any, label: str, left: float = 0.2, width: float = 0.6) -> None:
    """A horizontal colour bar at the bottom; `left` and `width` are parts of the figure's width."""
    height = figure.get_figheight()
    bar = figure.colorbar(
        drawn, cax=figure.add_axes((left, 0.45 / height, width, 0.1 / height)), orientation="horizontal"
    )
    bar.set_label("\n".join(wrap(label, int(14 * figure.get_figwidth()))), fontsize=9)
    bar.ax.tick_params(labelsize=8)
    bar.ax.locator_params(nbins=5 if width > 0.4 else 2)


def _ticks(axis: Any, size: tuple[int, ...]) -> None:
    """Ticks at the first and last row and column of an image of [height, width]."""
    axis.set_yticks([0, size[0] - 1] if size[0] > 1 else [0])
    axis.set_xticks([0, size[1] - 1] if size[1] > 1 else [0])
    axis.tick_params(labelsize=8)


def _aspect(maps: Array) -> float:
    """Height over width of maps [..., H, W], within what is good for a grid of them."""
    return float(np.clip(maps.shape[-2] / maps.shape[-1], 0.4, 2.0))


def _some(total: int, limit: int) -> list[int]:
    """At most `limit` of 0 to total - 1, evenly spaced, first and last among them."""
    return sorted(set(np.linspace(0, total - 1, min(total, limit)).round().astype(int).tolist()))


def _picture(pictures: Array, step: Optional[int]) -> Array:
    """One frame of [S, H, W, 3], or the mean of all."""
    return pictures.mean(0) if step is None or len(pictures) == 1 else pictures[step]


def _place(record: AttentionRecord) -> str:
    return f"{place_of(record.name)[0] or record.name}: {_KIND_NAMES[record.kind]}"


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
