"""Anytime inference: each sample stops when the model is sure of it, and takes no more part in the computation.

DT-SNN (arXiv 2305.17346) stops on the entropy of the mean logits so far; confidence and margin are as simple.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..models import StreamState
from .exits import ExitRule, calibrated_rule


class AnytimeResult(NamedTuple):
    """What a batch was answered, and when."""

    logits: Tensor  # [B, K], of the step at which each sample stopped
    steps: Tensor  # [B], int64: time steps that each sample took

    def __repr__(self) -> str:
        samples, classes = self.logits.shape
        if not samples:
            return f"AnytimeResult(no samples, {classes} classes)"
        mean = self.steps.double().mean()
        return f"AnytimeResult({samples} samples, {classes} classes, {mean:.2f} steps on average)"


class Anytime:
    """A model that stops early, see `anytime`. Nothing is kept between calls, so threads may share it.

    Attributes:
        model: The model that it runs.
        rule: When a sample stops.
        max_steps: Steps at most; None: the model's `time_steps` for images, all of a clip.
    """

    def __init__(self, model: Any, rule: ExitRule, max_steps: int | None) -> None:
        self.model = model
        self.rule = rule
        self.max_steps = max_steps

    def __repr__(self) -> str:
        most = "" if self.max_steps is None else f", max_steps={self.max_steps}"
        name = type(self.model).__name__
        return f"Anytime({name}, exit={self.rule.exit!r}, threshold={self.rule.threshold:.6g}{most})"

    @torch.no_grad()
    def __call__(self, x: Tensor) -> AnytimeResult:
        """Images [B, C, H, W] or clips [B, T, C, H, W] to logits [B, K] and steps [B].

        A sample's logits are those of `model` after so many steps. Which batch mates it has does not matter.

        Raises:
            ValueError: For a model in train mode, or an input that it does not take.
        """
        model = self.model
        if model.training:
            raise ValueError("the model is in train mode, where samples influence each other: call model.eval() first")
        clip = x.dim() == 5
        most = x.shape[1] if clip else model.time_steps
        most = most if self.max_steps is None else min(self.max_steps, most) if clip else self.max_steps
        running = torch.arange(len(x), device=x.device)
        steps = torch.zeros(len(x), dtype=torch.int64, device=x.device)
        if most < 1 or not len(x):  # nothing to step through: the model says what it makes of that
            return AnytimeResult(model(x), steps)
        answers = torch.empty(0)
        state: StreamState | None = None
        for step in range(1, most + 1):
            frame: Tensor | None
            if clip:
                frame = x[:, step - 1] if len(running) == len(x) else x[running, step - 1]
            else:
                frame = x if step == 1 else None
            logits, after = model.step(frame, state, donate=True)
            state = after
            if step == 1:
                answers = logits.new_empty(len(x), logits.shape[1])
            stops = self.rule.stops(logits) if step < most else torch.ones(len(running), dtype=torch.bool)
            stops = stops.to(running.device)
            leaving = running[stops]
            if not len(leaving):
                continue
            answers[leaving] = logits[stops]
            steps[leaving] = step
            if len(leaving) == len(running):
                break
            running, state = running[~stops], after.select(~stops, donate=True)
        return AnytimeResult(answers, steps)


def anytime(
    model: Any, exit: str | None = None, threshold: float | None = None, max_steps: int | None = None
) -> Anytime:
    """A model's answers as soon as it is sure of them: `logits, steps = anytime(model)(images)`.

    After each step, samples of which the model is sure leave the batch; the others go on. So time falls with the mean
    number of steps.

    Args:
        model: A model of this package, or what `deploy` made of one.
        exit: Measure of certainty: "confidence", the largest probability; "margin", that less the second one;
            "entropy", of all of them over the logarithm of their number.
        threshold: Stop where confidence or margin reach it, or entropy is not above it. None: the one that
            `timm-qkformer calibrate` wrote into the model's folder, with its exit.
        max_steps: Steps at most. None: the model's `time_steps` for images, all of a clip.

    Raises:
        TypeError: For another kind of model.
        ValueError: For an unknown exit, a threshold outside 0 to 1 or none to be found, `max_steps` below 1, or a model
            with fewer than two classes.
    """
    if not callable(getattr(model, "step", None)) or not hasattr(model, "time_steps"):
        raise TypeError(f"model is a {type(model).__name__}: give a model of timm_qkformer, without a wrapper")
    if model.num_classes < 2:
        raise ValueError(f"model has num_classes={model.num_classes}: to be sure of one there must be two at least")
    if max_steps is not None and (isinstance(max_steps, bool) or not isinstance(max_steps, int) or max_steps < 1):
        raise ValueError(f"max_steps={max_steps!r} must be an integer of at least 1")
    if threshold is not None:
        return Anytime(model, ExitRule("confidence" if exit is None else exit, threshold), max_steps)
    rule = calibrated_rule(model)
    if rule is None or exit not in (None, rule.exit):
        found = "the model has none of its own" if rule is None else f"the model's own is of exit={rule.exit!r}"
        raise ValueError(f"threshold is missing, and {found}: give one, or let `timm-qkformer calibrate` find it")
    return Anytime(model, rule, max_steps)
