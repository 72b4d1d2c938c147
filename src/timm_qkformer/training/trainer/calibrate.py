"""`timm-qkformer calibrate`: a model and labelled data to a threshold of anytime inference."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from timm.utils import unwrap_model

from ...data.images import readable
from ...devices import usable_device
from ...inference import deploy
from ...models import SpikingTransformer
from ...progress import Bar
from ...streaming.calibration import Calibration, Recorded, calibrate, halves, record, write_rule
from ...streaming.exits import EXITS
from .distributed import Processes
from .evaluate import ValidationSettings, load_measured, open_measured
from .network import forward_weights


@dataclass(frozen=True, kw_only=True)
class CalibrationSettings:
    """What a calibration needs beside the settings of a validation.

    Attributes:
        calibration_split: Split to choose on; None: one half of the validation's split, which reports on the other.
        exit: Measure of certainty, one of `EXITS`.
        points: The accuracy may be so much below that of T.
        limit: Take so many samples of each split, drawn at random.
        precision: Deploy the model so first; None: as it is.
        write: Into the model's folder, if it has one.
    """

    calibration_split: str | None = None
    exit: str = "confidence"
    points: float = 0.2
    limit: int | None = None
    precision: str | None = None
    write: bool = True


def run_calibration(settings: ValidationSettings, own: CalibrationSettings) -> tuple[Calibration, Path | None]:
    """Record logits, choose, measure, and write the rule into the model's folder.

    Returns:
        The calibration, and the file that now has its rule; None for models that are no folder.

    Raises:
        OSError, ValueError: If something is not as it needs to be.
    """
    if own.exit not in EXITS:
        raise ValueError(f"exit={own.exit!r} is unknown, choose one of {list(EXITS)}")
    if not 0.0 <= own.points <= 100.0:
        raise ValueError(f"points={own.points!r} must be from 0 to 100")
    if own.limit is not None and own.limit < 2:
        raise ValueError(f"limit={own.limit} must be at least 2")
    split = settings.val_split
    if own.calibration_split == split:
        raise ValueError(
            f"calibration_split={split!r} is what is reported on: name another, or leave it out for halves of {split!r}"
        )
    processes = Processes(usable_device(settings.device))
    model = load_measured(settings, processes).eval()
    if not isinstance(model, SpikingTransformer):
        raise ValueError(f"model {settings.model} is a {type(model).__name__}, which has no time steps")
    steps = model.time_steps
    if steps < 2:
        raise ValueError(f"the model has T = {steps}: there is no step to leave out; --time-steps T gives it more")

    def recorded(name: str) -> Recorded:
        dataset, loader = open_measured(settings, processes, model, name, own.limit)
        with forward_weights(settings, model):
            runner: Any = unwrap_model(model) if own.precision is None else deploy(model, own.precision)
            return record(runner, _shown(loader, len(dataset), name), steps, processes.device)

    reported = recorded(split)
    if own.calibration_split is None:
        chosen, reported = halves(reported)
        names = (f"half of {split!r}", f"the other half of {split!r}")
    else:
        chosen = recorded(own.calibration_split)
        names = (f"{own.calibration_split!r}", f"{split!r}")
    found = calibrate(chosen, reported, own.exit, own.points, names)
    folder = Path(settings.model.removeprefix("local-dir:")) if settings.model.startswith("local-dir:") else None
    return found, write_rule(folder, found) if own.write and folder is not None else None


def _shown(batches: Any, samples: int, name: str) -> Iterator[Any]:
    with Bar(total=samples, desc=name, unit="sample", leave=False, disable=None) as bar:
        for x, target in readable(batches):
            yield x, target
            bar.update(len(x))
