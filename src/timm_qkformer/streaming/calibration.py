"""The threshold at which a model stops: recorded logits, accuracy against mean T, the choice, where it is written."""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..data import split_by_class
from ..files import write_atomically
from .exits import EXITS, ExitRule, certainty, is_note, note_of, passes

_CANDIDATES = 400  # thresholds of a curve, at most


class Recorded(NamedTuple):
    """What a model answers after each step."""

    logits: Tensor  # [T, N, K], of all steps so far
    targets: Tensor  # [N]

    def take(self, samples: Any) -> "Recorded":
        """Of some samples."""
        return Recorded(self.logits[:, samples], self.targets[samples])

    @property
    def top1(self) -> list[float]:
        """Percent right after each step."""
        return (100.0 * self.right.double().mean(1)).tolist()

    @property
    def right(self) -> Tensor:
        """Which answers are right, bool [T, N]."""
        return self.logits.argmax(-1) == self.targets


@torch.no_grad()
def record(model: Any, batches: Iterable[Any], steps: int, device: Any = "cpu") -> Recorded:
    """Run all samples for `steps` steps, and keep the logits after each.

    Args:
        model: A model with `step`, in eval mode.
        batches: Of images [B, C, H, W] or clips [B, T, C, H, W], and class indices [B].
        steps: T; clips must have as many.
        device: Where inputs go.

    Raises:
        ValueError: For no samples, a class that is unknown, or clips that are too short.
    """
    logits, targets = [], []
    for x, target in batches:
        x = x.to(device)
        if x.dim() == 5 and x.shape[1] < steps:
            raise ValueError(f"clips have {x.shape[1]} time steps, calibration needs {steps}")
        answers, state = [], None
        for step in range(steps):
            frame = x[:, step] if x.dim() == 5 else x if step == 0 else None
            answer, state = model.step(frame, state, donate=True)
            answers.append(answer.float().cpu())
        logits.append(torch.stack(answers))
        targets.append(target.cpu())
    if not targets:
        raise ValueError("there are no samples to calibrate on")
    recorded = Recorded(torch.cat(logits, 1), torch.cat(targets))
    if int(recorded.targets.min()) < 0 or int(recorded.targets.max()) >= recorded.logits.shape[2]:
        raise ValueError(
            f"targets run from {recorded.targets.min()} to {recorded.targets.max()}, outside of the classes"
        )
    return recorded


class Point(NamedTuple):
    """What a threshold costs and gives."""

    threshold: float
    steps: float  # mean over the samples
    top1: float  # percent


def outcome(recorded: Recorded, rule: ExitRule) -> Point:
    """A rule's mean steps and accuracy."""
    certainties = certainty(recorded.logits, rule.exit)
    return _point(certainties, recorded.right, rule)


def _point(certainties: Tensor, right: Tensor, rule: ExitRule) -> Point:
    sure = passes(certainties, rule.threshold, rule.exit)
    sure[-1] = True
    last = sure.int().argmax(0)
    top1 = right.gather(0, last.unsqueeze(0)).double().mean().item()
    return Point(rule.threshold, last.double().mean().item() + 1.0, 100.0 * top1)


def curve(recorded: Recorded, exit: str) -> list[Point]:
    """Accuracy against mean steps, from the strictest threshold, where hardly a sample stops early, to the loosest."""
    certainties, right = certainty(recorded.logits, exit), recorded.right
    before = certainties[:-1].flatten().double()
    shares = torch.linspace(0.0, 1.0, min(_CANDIDATES, max(2, len(before))), dtype=torch.float64)
    ordered = before.sort().values if len(before) else torch.ones(1, dtype=torch.float64)
    thresholds = ordered[(shares * (len(ordered) - 1)).round().long()].clamp(0.0, 1.0).unique().tolist()
    strictest = 0.0 if exit == "entropy" else 1.0
    thresholds = sorted({strictest, *thresholds}, reverse=exit != "entropy")
    return [_point(certainties, right, ExitRule(exit, threshold)) for threshold in thresholds]


def choose(recorded: Recorded, exit: str, points: float) -> ExitRule:
    """The loosest threshold that stays within `points` of the accuracy after all steps, and so do all stricter ones.

    Raises:
        ValueError: For a negative or unbounded number of points, or an unknown exit.
    """
    if not 0.0 <= points <= 100.0:
        raise ValueError(f"points={points!r} must be from 0 to 100")
    if exit not in EXITS:
        raise ValueError(f"exit={exit!r} is unknown, choose one of {list(EXITS)}")
    least = recorded.top1[-1] - points - 1e-9
    found = curve(recorded, exit)
    chosen = found[0]
    for point in found:
        if point.top1 < least:
            break
        chosen = point
    # Halfway to the next one that would stop: rounding, which another batch may change, then decides nothing.
    values = certainty(recorded.logits[:-1], exit).double()
    looser = values[values > chosen.threshold] if exit == "entropy" else values[values < chosen.threshold]
    if len(looser):
        nearest = looser.min() if exit == "entropy" else looser.max()
        return ExitRule(exit, float(f"{(chosen.threshold + nearest.item()) / 2:.9g}"))
    return ExitRule(exit, chosen.threshold)


@dataclass(frozen=True)
class Calibration:
    """A rule, and what it does to samples that it was not chosen on."""

    rule: ExitRule
    max_steps: int  # T
    points: float  # that it may be below T
    chosen_on: dict[str, Any]  # samples, steps, top1, top1_by_step
    reported_on: dict[str, Any]
    error: float  # standard error of the difference in top1 between the rule and T, on what is reported
    curves: dict[str, list[Point]]  # of each exit, on what is reported

    @property
    def note(self) -> str:
        """How the rule stands in a model's config."""
        return note_of(self.rule, self.max_steps)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        values = asdict(self)
        values["curves"] = {exit: [point._asdict() for point in points] for exit, points in self.curves.items()}
        return values

    def text(self) -> str:
        """A few lines for a terminal."""
        found, T = self.reported_on, self.max_steps
        by_step = ", ".join(f"{top1:.2f} % after {step}" for step, top1 in enumerate(found["top1_by_step"], start=1))
        return "\n".join(
            (
                f"chosen on {self.chosen_on['samples']:,} samples ({self.chosen_on['data']}): stop at {self.rule.exit} "
                f"{self.rule.threshold:.6g}, {self.chosen_on['steps']:.2f} steps, {self.chosen_on['top1']:.2f} % "
                f"(T = {T}: {self.chosen_on['top1_by_step'][-1]:.2f} %)",
                f"measured on {found['samples']:,} others ({found['data']}): {found['top1']:.2f} % with "
                f"{found['steps']:.2f} steps on average, {found['top1'] - found['top1_by_step'][-1]:+.2f} points "
                f"(standard error {self.error:.2f}) against T = {T}",
                f"all samples for as many steps: {by_step}",
            )
        )


def calibrate(
    chosen_on: Recorded, reported_on: Recorded, exit: str = "confidence", points: float = 0.2, names: Any = ("", "")
) -> Calibration:
    """Choose a threshold on some samples and measure it on others; `names` says what either are."""
    rule = choose(chosen_on, exit, points)
    results = []
    for name, recorded in zip(names, (chosen_on, reported_on), strict=True):
        point = outcome(recorded, rule)
        facts = {"data": name, "samples": len(recorded.targets), "steps": point.steps, "top1": point.top1}
        results.append({**facts, "top1_by_step": recorded.top1})
    curves = {name: curve(reported_on, name) for name in EXITS}
    error = _standard_error(reported_on, rule)
    return Calibration(rule, len(reported_on.logits), points, results[0], results[1], error, curves)


def _standard_error(recorded: Recorded, rule: ExitRule) -> float:
    """Of the difference in accuracy to all steps, in points: of pairs, since both answer the same samples."""
    sure = rule.stops(recorded.logits)
    sure[-1] = True
    early = recorded.right.gather(0, sure.int().argmax(0, keepdim=True))[0]
    differences = early.double() - recorded.right[-1].double()
    return 100.0 * differences.std(correction=0).item() / len(differences) ** 0.5


def halves(recorded: Recorded, seed: int = 0) -> tuple[Recorded, Recorded]:
    """Two halves of the samples, class by class at random: one to choose on, one to report on.

    Raises:
        ValueError: For fewer than two samples.
    """
    first, second = split_by_class(recorded.targets.tolist(), 0.5, seed)
    if not first or not second:
        raise ValueError("there are too few samples to choose a threshold on some and measure it on others")
    return recorded.take(torch.tensor(first)), recorded.take(torch.tensor(second))


def write_rule(folder: Path, calibration: Calibration) -> Path:
    """Write a rule into the config.json of a model's folder, complete or not at all, in place of one that was there.

    Returns:
        The file.

    Raises:
        OSError, ValueError: If there is no such file, or it is no config.
    """
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    cfg = config.get("pretrained_cfg") if isinstance(config, dict) else None
    if not isinstance(cfg, dict):
        raise ValueError(f"{path} has no pretrained_cfg: it is no folder that `timm-qkformer convert` wrote")
    notes = cfg.get("notes") or []
    notes = [notes] if isinstance(notes, str) else list(notes)
    cfg["notes"] = [note for note in notes if not is_note(note)] + [calibration.note]
    write_atomically(path, json.dumps(config, indent=2) + "\n")
    return path
