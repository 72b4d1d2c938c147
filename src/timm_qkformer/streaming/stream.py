"""Event streams in real time: windows go through `model.step` one by one, and each has an answer."""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from timm.data import resolve_model_data_config
from torch import Tensor

from ..models import StreamState
from .windows import Window


@dataclass(frozen=True)
class Prediction:
    """What the model answers after a window.

    Attributes:
        start, end: Of the window, in microseconds on the camera's clock.
        events: In the window.
        logits: Of all windows since the state was at rest, [K].
        steps: How many those were.
        seconds: What the window took from its events to the answer: counting them, and the model.
        state: After the window, to save or to go on from; None with `states=False`.
    """

    start: int
    end: int
    events: int
    logits: Tensor
    steps: int
    seconds: float
    state: StreamState | None = field(repr=False)

    @property
    def label(self) -> int:
        """Class that comes first."""
        return int(self.logits.argmax())

    @property
    def probabilities(self) -> Tensor:
        """Of the classes, [K]."""
        return self.logits.float().softmax(0)


def stream(
    model: Any,
    windows: Iterable[Window],
    *,
    restart: int | None = None,
    state: StreamState | None = None,
    states: bool = True,
) -> Iterator[Prediction]:
    """Answer each window as it comes.

    Before the first one the model runs once on an empty frame, which counts for nothing: memory and kernels are ready
    when the stream begins.

    Args:
        model: A model of two input channels, plain or deployed, in eval mode.
        windows: From `cut_windows`.
        restart: Begin from rest again after so many windows, since logits are the mean over all windows before: for
            streams that show one thing after the other. None: never.
        state: Go on from here, a `Prediction`'s state.
        states: Give states along. Without them a step may take the memory of the one before, which is faster.

    Raises:
        ValueError: For a model that takes no events or is in train mode, `restart` below 1, or another model's state.
    """
    if model.in_chans != 2:
        raise ValueError(f"the model takes {model.in_chans} channels, not the 2 of events")
    if model.training:
        raise ValueError("the model is in train mode: call model.eval() first")
    if restart is not None and restart < 1:
        raise ValueError(f"restart={restart} must be at least 1")
    return _stream(model, windows, restart, state, states)


@torch.no_grad()
def _stream(
    model: Any, windows: Iterable[Window], restart: int | None, state: StreamState | None, states: bool
) -> Iterator[Prediction]:
    normalise = _normaliser(model)
    own = False  # whether nobody else has the state
    steps = 0 if state is None else int(state.steps[0])
    ready = False
    for window in windows:
        if not ready:
            model.step(normalise(torch.zeros_like(window.frame)), None)
            ready = True
        begin = time.perf_counter()
        if restart is not None and steps >= restart:
            state, steps = None, 0
        logits, state = model.step(normalise(window.frame), state, donate=own)
        answer, steps, own = logits[0].cpu(), steps + 1, not states
        seconds = time.perf_counter() - begin + window.seconds
        yield Prediction(window.start, window.end, window.events, answer, steps, seconds, state if states else None)


def _normaliser(model: Any) -> Callable[[Tensor], Tensor]:
    """From counts to the model's input."""
    weight = next(iter(model.head.parameters()), torch.zeros(()))
    config = resolve_model_data_config(model)
    if all(mean == 0 for mean in config["mean"]) and all(std == 1 for std in config["std"]):  # as for events
        return lambda frame: frame.to(weight)
    mean, std = (torch.tensor(config[name], dtype=torch.float32).view(-1, 1, 1) for name in ("mean", "std"))
    return lambda frame: ((frame - mean) / std).to(weight)


def delays(predictions: Sequence[Any]) -> list[float]:
    """Seconds from each window's end, in the recording's own time, to its answer: it waits for those before it."""
    result, free = [], 0.0
    for row in predictions:
        end = row.end * 1e-6
        free = max(free, end) + row.seconds
        result.append(free - end)
    return result
