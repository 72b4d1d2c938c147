"""Results of training runs that ship with the package: training/results/*.json.

Each file is a JSON list of runs:

    {"experiment": "ablation_time_steps", "variant": "T=1", "seed": 0, "top1": 71.2, "epochs": 20, "seconds": 800.0,
     "command": "timm-qkformer train ..."}
"""

import json
import re
import statistics
from collections.abc import Iterable
from dataclasses import dataclass, fields
from importlib.resources import files
from importlib.resources.abc import Traversable
from typing import Any

from ..neurons import neuron_names
from ..operators import operator_names


@dataclass(frozen=True)
class Run:
    """One training run."""

    experiment: str  # what it belongs to, such as "ablation_time_steps" or "cifar10"
    variant: str  # what was varied
    seed: int  # its seed
    top1: float  # accuracy on the test set in percent
    epochs: int  # epochs trained
    seconds: float  # time that took
    command: str  # how to repeat it


@dataclass(frozen=True)
class Summary:
    """Runs that differ in their seed alone."""

    variant: str  # in the paper's spelling, see `canonical_variant`
    mean: float  # mean top-1 in percent
    std: float | None  # sample standard deviation over the seeds; None for a single run
    runs: tuple[Run, ...]  # the runs

    def __str__(self) -> str:
        spread = "" if self.std is None else f" ± {self.std:.2f}"
        return f"{self.mean:.2f}{spread} ({len(self.runs)} seed{'s' if len(self.runs) > 1 else ''})"


def read_runs(folder: Traversable | None = None) -> list[Run]:
    """All runs, from the package's own results or from another folder.

    Raises:
        ValueError: Naming the file and the entry that is not of the format above.
    """
    folder = files("timm_qkformer.training") / "results" if folder is None else folder
    if not folder.is_dir():
        return []
    runs = []
    for file in sorted(folder.iterdir(), key=lambda entry: entry.name):
        if file.name.endswith(".json"):
            try:
                entries = json.loads(file.read_text(encoding="utf-8"))
            except ValueError as error:
                raise ValueError(f"{file.name} is not JSON: {error}") from error
            if not isinstance(entries, list):
                raise ValueError(f"{file.name} must be a list of runs, it is a {type(entries).__name__}")
            runs += [_run(entry, f"{file.name}, entry {i}") for i, entry in enumerate(entries)]
    return runs


def _run(entry: Any, place: str) -> Run:
    if not isinstance(entry, dict):
        raise ValueError(f"{place} must be a run, it is {entry!r}")
    values: dict[str, Any] = {}
    for field in fields(Run):
        value = entry.get(field.name)
        numeric = field.type in (int, float)
        if isinstance(value, bool) or not isinstance(value, (int, float) if numeric else str):
            raise ValueError(f"{place} has {field.name}={value!r}, which must be a {'number' if numeric else 'text'}")
        values[field.name] = value
    return Run(**values)


def summarize(runs: Iterable[Run], experiment: str) -> list[Summary]:
    """Mean and spread over the seeds, in the order of the variants' first run.

    ValueError if a variant has two runs with one seed, or with different numbers of epochs.
    """
    groups: dict[str, list[Run]] = {}
    for run in runs:
        if run.experiment == experiment:
            groups.setdefault(canonical_variant(experiment, run.variant), []).append(run)
    summaries = []
    for variant, group in groups.items():
        if len({run.seed for run in group}) < len(group) or len({run.epochs for run in group}) > 1:
            raise ValueError(
                f"{experiment}, {variant}: runs that are put together must have one seed each, equal epochs"
            )
        scores = [run.top1 for run in group]
        std = statistics.stdev(scores) if len(scores) > 1 else None
        summaries.append(Summary(variant, statistics.fmean(scores), std, tuple(group)))
    return summaries


def canonical_variant(experiment: str, variant: str) -> str:
    """A variant in the paper's spelling: "T = 4", "QKTA + SSA" or "LIF"; as it is where that cannot be told."""
    if experiment == "ablation_time_steps" and (found := re.search(r"\d+", variant)):
        return f"T = {int(found[0])}"
    if experiment == "ablation_attention" and (kinds := re.findall(_any_of(operator_names()), variant.lower())):
        return " + ".join(dict.fromkeys(kind.upper() for kind in kinds))
    if experiment == "ablation_neuron" and (found := re.search(_any_of(neuron_names()), variant.lower())):
        return found[0].upper()
    return variant


def _any_of(names: Iterable[str]) -> str:
    """A pattern for one of the names, the longest first: "plif" ends with "lif"."""
    return "|".join(re.escape(name) for name in sorted(names, key=len, reverse=True))
