"""What the page shows of one file, without the page: answers step by step, attention, spikes, energy."""

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import timm
import torch
from torch import Tensor, nn

from ..analysis import energy, firing_rates, pick_neurons, record_attention, record_layer
from ..analysis.attention import select_layers
from ..analysis.drawing import QUERY_KEY, draw_attention, draw_raster, draw_steps
from ..analysis.inputs import ModelInputs, find_files
from ..hub.loading import LoadedModel, load_model, shipped_models
from ..streaming import ExitRule, calibrated_rule

if TYPE_CHECKING:
    from matplotlib.figure import Figure

EXIT = ExitRule("confidence", 0.9)  # of models that have no rule of their own
SHOWN_LAYERS = 2  # pictures of attention: more take longer than they are looked at
_NAMES = 10  # classes in the chart


class Models:
    """The models that the page offers, each loaded when it is first asked for, once for all users.

    Args:
        names: What `load_model` takes. Empty: those that come with the package, for images first.
        device: Where they run.
    """

    def __init__(self, names: Sequence[str] = (), device: str | torch.device = "cpu") -> None:
        self.names = list(names) or sorted(shipped_models(), key=_takes_events)  # most people have pictures
        self.device = device
        self._loaded: dict[str, LoadedModel] = {}
        self._lock = threading.Lock()

    def __getitem__(self, name: str) -> LoadedModel:
        """The model of this name; ValueError for one that is not offered."""
        if name not in self.names:
            raise ValueError(f"model={name!r} is not offered here, choose one of {', '.join(self.names)}")
        with self._lock:
            if name not in self._loaded:
                loaded = load_model(name)
                loaded.model.to(self.device)
                self._loaded[name] = loaded
            return self._loaded[name]


def _takes_events(name: str) -> bool:
    return bool(timm.get_pretrained_cfg(name).input_size[0] == 2)


@dataclass(frozen=True)
class Look:
    """A model's look at one file."""

    names: list[str]  # of the classes
    probabilities: Tensor  # after each time step [T, classes]
    settled: int  # the step, from 1, from which on the answer stays the last one
    rule: ExitRule  # of anytime inference: the model's own, or `EXIT`
    exit_step: int  # the step, from 1, after which it stops
    steps: "Figure"  # probabilities by step
    attention: "list[Figure]"  # masks over the picture
    raster: "Figure"  # which neurons of the first keys fire when
    summary: str  # firing rate, operations and energy, in Markdown

    @property
    def answer(self) -> dict[str, float]:
        """Probability by class after the last step."""
        return dict(zip(self.names, self.probabilities[-1].tolist(), strict=True))

    @property
    def sentence(self) -> str:
        """The answer, since when it stands, and when anytime inference gives it, in Markdown."""
        count = len(self.probabilities)
        best = self.names[int(self.probabilities[-1].argmax())]
        if count == 1:
            return f"**{best}**, in a single time step."
        early = self.names[int(self.probabilities[self.exit_step - 1].argmax())]
        sign = "at most" if self.rule.exit == "entropy" else "at least"
        stops = f"stops after step {self.exit_step} with {early}"
        if self.exit_step == count and not self.rule.stops(self.probabilities.log())[-1]:
            stops = "takes them all"
        return (
            f"**{best}**, from time step {self.settled} of {count} on. Anytime inference "
            f"({self.rule.exit} of {sign} {self.rule.threshold:.3g}) {stops}."
        )


def look_at(loaded: LoadedModel, path: Path, sensor_size: tuple[int, int] | None = None) -> Look:
    """Show a model a picture or a recording of events.

    Args:
        loaded: The model.
        path: An image or a recording (.npz, .aedat4, .bin, .bs2, ...).
        sensor_size: (height, width) of the event camera, where the file does not state it.

    Raises:
        OSError, ValueError: For a file that is damaged, of an unknown kind, or not what the model takes.
    """
    model = loaded.model
    find_files(path)  # refuses other kinds by name
    item = ModelInputs(model, sensor_size).read(path)
    x = item.x.to(next(model.parameters()).device)
    logits = _logits(model, x)
    probabilities = logits.softmax(1)
    answers = probabilities.argmax(1)
    rule = calibrated_rule(model) or EXIT
    sure = rule.stops(logits)
    sure[-1] = True
    names = _class_names(model, probabilities.shape[1])

    layers = select_layers(model)
    records = record_attention(model, x, list(layers)[:SHOWN_LAYERS])
    figures = draw_attention(records, item.pictures, loaded.title)
    figures.pop(QUERY_KEY, None)
    keys = f"{records[0].name}.{layers[records[0].name].inputs[:2][-1]}.neuron"
    return Look(
        names=names,
        probabilities=probabilities,
        settled=1 + max((t + 1 for t, answer in enumerate(answers) if answer != answers[-1]), default=0),
        rule=rule,
        exit_step=1 + int(sure.int().argmax()),
        steps=draw_steps(probabilities.numpy(), names, _NAMES),
        attention=list(figures.values()),
        raster=draw_raster(*pick_neurons(record_layer(model, x, keys)), keys),
        summary=_summary(model, x),
    )


@torch.inference_mode()
def _logits(model: Any, x: Tensor) -> Tensor:
    """After each time step [T, classes]: an image is shown again and again, a clip has a frame for each step."""
    frames: Sequence[Tensor | None] = x.unbind(1) if x.ndim == 5 else [x, *[None] * (model.time_steps - 1)]
    state, found = None, []
    for frame in frames:
        logits, state = model.step(frame, state)
        found.append(logits[0].float().cpu())
    return torch.stack(found)


def _class_names(model: Any, count: int) -> list[str]:
    names = (getattr(model, "pretrained_cfg", None) or {}).get("label_names")
    return [str(name) for name in names] if names and len(names) == count else [str(i) for i in range(count)]


def _summary(model: nn.Module, x: Tensor) -> str:
    rates, cost = firing_rates(model, x), energy(model, x)
    return (
        f"| | this network | the same as an ANN |\n|---|--:|--:|\n"
        f"| firing rate, spikes per neuron and time step | {rates.mean:.3f} | |\n"
        f"| synaptic operations | {cost.sops / 1e6:.1f} M | |\n"
        f"| multiply-accumulates | {cost.macs / 1e6:.1f} M | {cost.flops / 1e6:.1f} M |\n"
        f"| energy by the papers' convention | {cost.pj * 1e-6:.1f} µJ | {cost.ann_pj * 1e-6:.1f} µJ |\n"
    )
