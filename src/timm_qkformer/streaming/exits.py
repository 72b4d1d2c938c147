"""When a model is sure: how certain logits are, the rule that stops a sample, and where a model's rule is written.

A rule stands in a model's pretrained config, as one of its `notes`: "anytime: confidence 0.8047, T = 4". timm carries
notes from a folder's config.json or from the Hub to the model, and `deploy` copies them.
"""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# Measure of certainty: what it is of the probabilities p of K classes.
EXITS = {
    "confidence": "the largest p",
    "margin": "the largest p less the second",
    "entropy": "-sum(p log p) / log K, which falls as the model gets surer",
}
_NOTE = re.compile(r"anytime: (\w+) ([\d.eE+-]+), T = (\d+)")


@dataclass(frozen=True)
class ExitRule:
    """When a sample stops.

    Attributes:
        exit: "confidence" or "margin": stop where it reaches the threshold; "entropy": where it is not above it.
        threshold: From 0 to 1.

    Raises:
        ValueError: For another exit, or a threshold out of range.
    """

    exit: str
    threshold: float

    def __post_init__(self) -> None:
        if self.exit not in EXITS:
            raise ValueError(f"exit={self.exit!r} is unknown, choose one of {list(EXITS)}")
        if isinstance(self.threshold, bool) or not isinstance(self.threshold, (int, float)):
            raise TypeError(f"threshold={self.threshold!r} must be a number from 0 to 1")
        if not 0.0 <= self.threshold <= 1.0:  # nan, too
            raise ValueError(f"threshold={self.threshold!r} must be from 0 to 1: {self.exit} is {EXITS[self.exit]}")

    def stops(self, logits: Tensor) -> Tensor:
        """Which samples stop, bool [...], of logits [..., K]."""
        return passes(certainty(logits, self.exit), self.threshold, self.exit)


def certainty(logits: Tensor, exit: str) -> Tensor:
    """A measure of `EXITS` for logits [..., K], in float32 at least: [...], from 0 to 1."""
    p = logits.to(torch.promote_types(logits.dtype, torch.float32)).softmax(-1)
    if exit == "confidence":
        return p.amax(-1)
    if exit == "margin":
        first, second = p.topk(2, -1).values.unbind(-1)
        return first - second
    return torch.special.entr(p).sum(-1) / math.log(p.shape[-1])


def passes(certainties: Tensor, threshold: float, exit: str) -> Tensor:
    """Which certainties are enough, bool of their shape."""
    return certainties <= threshold if exit == "entropy" else certainties >= threshold


def note_of(rule: ExitRule, max_steps: int) -> str:
    """A rule and the T that it was calibrated with, as it stands among a config's notes."""
    return f"anytime: {rule.exit} {rule.threshold:.9g}, T = {max_steps}"


def is_note(note: Any) -> bool:
    """Whether an entry of a config's notes is about anytime inference."""
    return isinstance(note, str) and note.startswith("anytime:")


def calibrated_rule(model: Any) -> ExitRule | None:
    """The rule that a model's pretrained config has; None if it has none.

    Raises:
        ValueError: If what it has is no rule.
    """
    notes = (getattr(model, "pretrained_cfg", None) or {}).get("notes") or ()
    found = [note for note in ([notes] if isinstance(notes, str) else _iterable(notes)) if is_note(note)]
    if not found:
        return None
    match = _NOTE.fullmatch(found[-1])
    try:
        if match is None:
            raise ValueError("it is no 'anytime: EXIT THRESHOLD, T = STEPS'")
        return ExitRule(match[1], float(match[2]))
    except ValueError as error:
        raise ValueError(f"the model's pretrained_cfg has the note {found[-1][:100]!r}: {error}") from error


def _iterable(notes: Any) -> Iterable[Any]:
    return notes if isinstance(notes, (list, tuple)) else ()
