"""Everything about a model at a glance: firing rates, operations and energy, parameters, memory and speed.

As numbers, as text for a terminal, and as a page of HTML that needs no other file and no network.
"""

import base64
import io
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from html import escape
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .energy import AC_PJ, MAC_PJ, Energy, EnergyMeter
from .hooks import Data, bare_model, inference, run_samples
from .memory import peak_memory
from .notebook import html_table
from .rates import FiringRates, RateMeter

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_STEPS = 4  # columns of single time steps; longer clips are shown at evenly spaced ones
_UNTRAINED = (
    "The weights are random: rates and energy are those of an untrained model and say nothing about a trained one."
)
_COUNTING = (
    "Rates are spikes per neuron and time step, mean and standard deviation over the samples; X' of Q-K attention is "
    "the mask times K, which no neuron fires. A dead channel never fired, a saturated one always did. "
    "SOP is rate x T x FLOP, where FLOP counts the multiply-accumulates of a time step; sums of spikes count as that "
    "many additions. The first convolution sees pixels and the classifier means: multiply-accumulates. "
    "Energy: 45 nm, M. Horowitz, ISSCC 2014, as used by Spikformer and QKFormer; batch norm is folded into "
    "convolutions; neurons, shortcut additions, pooling and memory access are not counted."
)

Row = Sequence[str]
Table = tuple[str, Row, Sequence[Row]]  # title, header, rows


@dataclass(frozen=True)
class Speed:
    """How fast batches run: median and quartiles of the rounds, the first one left out."""

    batch_size: int  # samples in a batch
    rounds: int  # batches timed
    per_second: float  # samples a second
    quartiles: tuple[float, float]  # lower and upper
    device: str  # it ran on this, in this dtype, with so many threads
    dtype: str
    threads: int


@dataclass(frozen=True, repr=False)
class Profile:
    """What `profile` measured."""

    model: str  # name of the model
    weights: str  # where its weights come from
    is_random: bool  # whether they are untrained: then rates and energy say nothing about a trained model's
    data: str  # what it ran on
    parameters: int  # of the model
    peak_bytes: int  # of a forward pass of one batch, see `peak_memory`
    speed: Speed  # of batches of the same size
    rates: FiringRates  # per layer and total
    energy: Energy  # likewise

    def __repr__(self) -> str:
        return f"Profile({self.model}, {self.weights}, on {self.data}: {self.rates!r}, {self.energy!r})"

    def _repr_html_(self) -> str:
        rows = [
            ("data", self.data),
            ("parameters", f"{self.parameters:,}"),
            ("firing rate", f"{self.rates.mean:.4f}"),
            ("energy, millijoules", f"{self.energy.pj * 1e-9:.4g}"),
            ("memory of a batch, MB", f"{self.peak_bytes / 1e6:.1f}"),
        ]
        return html_table(f"{self.model}, {self.weights}", ("", ""), rows)

    def to_dict(self) -> dict[str, Any]:
        """For JSON: the attributes, with those of the parts."""
        return asdict(self)


def profile(
    model: nn.Module,
    data: Data,
    *,
    name: str = "",
    weights: str = "as given",
    is_random: bool = False,
    data_name: str = "as given",
    batch_size: int = 1,
    rounds: int = 5,
    mac_pj: float = MAC_PJ,
    ac_pj: float = AC_PJ,
) -> Profile:
    """Measure a model on data, in one pass over it.

    Args:
        model: A model made of this package's layers, see `energy`.
        data: See `firing_rates`.
        name: Of the model. Empty: its class's.
        weights: Where they come from, for the report.
        is_random: Whether the model is untrained.
        data_name: What the data are, for the report.
        batch_size: Samples in the batches that are timed and whose memory is taken: the first of the data, over again
            if there are fewer.
        rounds: Batches timed, 2 or more.
        mac_pj, ac_pj: See `energy`.

    Raises:
        ValueError: As `energy`, and for a `batch_size` or `rounds` that is too small.
    """
    if batch_size < 1 or rounds < 2:
        raise ValueError(f"batch_size={batch_size} must be at least 1, rounds={rounds} at least 2")
    model = bare_model(model)
    first: list[Tensor] = []

    def keep_first(x: Tensor) -> None:
        if len(first) < batch_size:
            first.append(x)

    rate_meter, energy_meter = RateMeter(), EnergyMeter()
    samples, shape = run_samples(model, data, [rate_meter, energy_meter], keep_first)
    batch = torch.cat([first[i % len(first)] for i in range(batch_size)])
    return Profile(
        name or type(model).__name__,
        weights,
        is_random,
        data_name,
        sum(p.numel() for p in model.parameters()),
        peak_memory(model, batch),
        _speed(model, batch, rounds),
        rate_meter.result(samples, shape),
        energy_meter.result(samples, shape, mac_pj, ac_pj),
    )


@torch.no_grad()
def _speed(model: nn.Module, batch: Tensor, rounds: int) -> Speed:
    seconds = []
    with inference(model):
        for _ in range(rounds + 1):
            start = time.perf_counter()
            model(batch)
            if batch.is_cuda:
                torch.cuda.synchronize(batch.device)
            seconds.append(time.perf_counter() - start)
    rates = [len(batch) / elapsed for elapsed in seconds[1:]]
    lower, median, upper = statistics.quantiles(rates, n=4)
    dtype = str(batch.dtype).removeprefix("torch.")
    return Speed(len(batch), rounds, median, (lower, upper), str(batch.device), dtype, torch.get_num_threads())


def text_report(profile: Profile, layers: int | None = None) -> str:
    """Tables for a terminal.

    Args:
        profile: What was measured.
        layers: Show the layers that fire most and those that take most energy, so many of each. None: all.
    """
    lines = [*([f"NOTE: {_UNTRAINED}", ""] if profile.is_random else [])]
    summary = _summary(profile)
    width = max(len(name) for name, _ in summary)
    lines += [f"{name:<{width}}  {value}" for name, value in summary]
    tables = (
        (_rates_table(profile.rates), [layer.mean for layer in profile.rates.layers], "that fire most"),
        (_energy_table(profile.energy), [layer.pj for layer in profile.energy.layers], "that take most energy"),
    )
    for (title, header, rows), sizes, largest in tables:
        shown = sorted(sorted(range(len(rows)), key=lambda i: -sizes[i])[:layers])
        if len(shown) < len(rows):
            title += f": the {len(shown)} of {len(rows)} {largest} (--all shows all)"
        lines += ["", title, *_aligned(header, [rows[i] for i in shown])]
    return "\n".join(lines)


def html_report(profile: Profile, figures: Mapping[str, "Figure"]) -> str:
    """A page with the tables and with figures, by their captions, embedded as pictures."""
    title = escape(f"{profile.model}: profile")
    note = f'<p class="note">{escape(_UNTRAINED)}</p>' if profile.is_random else ""
    tables = "".join(
        f"<h2>{escape(heading)}</h2>{_html_table(header, rows)}"
        for heading, header, rows in (_rates_table(profile.rates), _energy_table(profile.energy))
    )
    pictures = "".join(_html_figure(caption, figure) for caption, figure in figures.items())
    summary = "".join(f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>" for name, value in _summary(profile))
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 70em; padding: 0 1em; }}
table {{ border-collapse: collapse; font-size: 13px; }}
th, td {{ border-bottom: 1px solid #ddd; padding: 2px 8px; text-align: left; white-space: nowrap; }}
td.number {{ text-align: right; font-variant-numeric: tabular-nums; }}
.wide {{ overflow-x: auto; }}
.note {{ background: #fff3cd; border-left: 5px solid #d39e00; padding: 0.6em 1em; }}
img {{ max-width: 100%; }}
</style>
</head>
<body>
<h1>{title}</h1>
{note}
<table>{summary}</table>
<p>{escape(_COUNTING)}</p>
{pictures}
{tables}
</body>
</html>
"""


def _summary(profile: Profile) -> list[tuple[str, str]]:
    rates, energy, speed = profile.rates, profile.energy, profile.speed
    threads = f", {speed.threads} threads" if speed.device == "cpu" else ""
    neurons = [layer for layer in rates.layers if layer.is_neuron]
    channels, dead, saturated = (
        sum(counts) for counts in zip(*((n.channels, len(n.dead), len(n.saturated)) for n in neurons), strict=True)
    )
    return [
        ("model", profile.model),
        ("weights", profile.weights),
        ("data", profile.data),
        ("samples", f"{rates.samples:,} of {'x'.join(map(str, rates.input_shape))}, T = {rates.time_steps}"),
        ("parameters", f"{profile.parameters:,}"),
        ("peak memory", f"{profile.peak_bytes / 2**20:,.1f} MiB, batch of {speed.batch_size}, eager mode"),
        (
            "speed",
            f"{speed.per_second:.2f} samples/s ({speed.quartiles[0]:.2f} to {speed.quartiles[1]:.2f}), batch of "
            f"{speed.batch_size}, {speed.dtype} on {speed.device}{threads}",
        ),
        ("firing rate", f"{rates.mean:.4f} spikes per neuron and time step"),
        ("channels", f"{dead:,} dead and {saturated:,} saturated of {channels:,}"),
        ("SOP", f"{energy.sops / 1e9:.4g} G (additions that take place: {energy.additions / 1e9:.4g} G)"),
        ("MAC", f"{energy.macs / 1e9:.4g} G, first convolution and classifier"),
        ("energy", f"{energy.pj * 1e-9:.4g} mJ ({energy.mac_pj} pJ per MAC, {energy.ac_pj} pJ per addition)"),
        ("the same ANN", f"{energy.flops / 1e9:.4g} G MAC, {energy.ann_pj * 1e-9:.4g} mJ"),
    ]


def _rates_table(rates: FiringRates) -> Table:
    count = min(rates.time_steps, _STEPS)
    steps = sorted({round(i * (rates.time_steps - 1) / max(count - 1, 1)) for i in range(count)})
    header = ["part", "name", "rate", "std", *(f"t={t + 1}" for t in steps), "dead", "saturated", "channels", "module"]
    rows = [
        [
            layer.place,
            layer.name,
            *(f"{rate:.4f}" for rate in (layer.mean, layer.std)),
            *(f"{layer.step_means[t]:.4f}" if t < len(layer.step_means) else "-" for t in steps),
            *map(str, (len(layer.dead), len(layer.saturated), layer.channels)),
            layer.path,
        ]
        for layer in rates.layers
    ]
    return "Firing rates", header, rows


def _energy_table(energy: Energy) -> Table:
    header = ["part", "operation", "input", "rate", "steps", "MFLOP", "MSOP", "M additions", "MMAC", "µJ", "module"]
    rows = [
        [
            layer.place,
            layer.operation,
            layer.input,
            "" if layer.rate is None else f"{layer.rate:.4f}",
            str(layer.steps),
            *(f"{n / 1e6:.3f}" for n in (layer.flops, layer.sops, layer.additions, layer.macs, layer.pj)),
            layer.path,
        ]
        for layer in energy.layers
    ]
    return "Operations and energy per sample", header, rows


def _is_number(text: str) -> bool:
    return text.replace(".", "", 1).isdigit()


def _aligned(header: Row, rows: Sequence[Row]) -> list[str]:
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    right = [all(_is_number(row[i]) or row[i] == "" for row in rows) for i in range(len(header))]

    def line(row: Row) -> str:
        cells = (
            cell.rjust(width) if number else cell.ljust(width)
            for cell, width, number in zip(row, widths, right, strict=True)
        )
        return "  ".join(cells).rstrip()

    return [line(header), *(line(row) for row in rows)]


def _html_table(header: Row, rows: Sequence[Row]) -> str:
    def cell(text: str) -> str:
        return f'<td class="number">{text}</td>' if _is_number(text) else f"<td>{escape(text)}</td>"

    head = "".join(f"<th>{escape(text)}</th>" for text in header)
    body = "".join(f"<tr>{''.join(map(cell, row))}</tr>" for row in rows)
    return f'<div class="wide"><table><tr>{head}</tr>{body}</table></div>'


def _html_figure(caption: str, figure: "Figure") -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, metadata={"Software": None})
    data = base64.b64encode(buffer.getvalue()).decode("ascii")
    return f'<h2>{escape(caption)}</h2><img alt="{escape(caption)}" src="data:image/png;base64,{data}">'
