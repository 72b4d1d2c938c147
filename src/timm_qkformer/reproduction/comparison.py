"""A fair comparison: one recipe, one budget and the same seeds for every attention in one skeleton and every family at
about 1.2 M parameters.

`run_comparison` trains what is missing, measures each model and keeps a row for each in comparison.json;
`comparison_section` makes the table of such rows. Trainings resume where they were broken off. Latencies are measured
when nothing trains any more.
"""

import csv
import json
import math
import multiprocessing
import os
import statistics
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from importlib.resources import files
from importlib.resources.abc import Traversable
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from tqdm import tqdm

from ..files import read_kept, write_atomically
from ..training.recipes import read_yaml, recipe_path

SEEDS = (0, 1, 2)
RECIPES = {"cifar10": "cpu_minutes", "nmnist": "cpu_minutes_events"}  # what all entries are trained with, by data set
_SENSOR = {"nmnist": (34, 34)}
_SKELETON = {"patch_embed": "imagenet", "embed_dims": [48, 96, 192], "depths": [1, 1, 1], "num_heads": 4}
# 8 x 8 tokens, halved early as the skeleton's are
_FLAT = {"embed_dim": 176, "depth": 2, "num_heads": 4, "pools": "1100"}


@dataclass(frozen=True)
class Entry:
    """What is compared: a name for the table, a registered model, its arguments."""

    name: str
    model: str
    args: Mapping[str, Any]


def _attention(operator: str) -> Entry:
    return Entry(operator, "qkformer_hst4_384", {**_SKELETON, "attn": operator})


GROUPS: Mapping[str, tuple[Entry, ...]] = {
    "attention": tuple(
        map(
            _attention,
            ("qkta", "qkca", "ssa", "sdsa", "a2os2a", "tim", "experts", "ff_lidiff", "dwc3", "dwc5", "dwc7"),
        )
    ),
    "family": (
        Entry("QKFormer", "qkformer_hst4_384", _SKELETON),
        Entry("QKFormer, membrane shortcuts", "qkformer_hst4_384", {**_SKELETON, "membrane_shortcut": True}),
        Entry("Max-Former", "maxformer_10_384", {"embed_dims": [48, 96, 192], "depths": [1, 1, 1], "num_heads": 4}),
        Entry("SpiLiFormer", "spiliformer_4_384", _SKELETON),
        Entry("Spikformer", "spikformer_4_384", _FLAT),
        Entry("Spikformer with CML", "spikformer_4_384_cml", _FLAT),
        Entry("Spikingformer", "spikingformer_4_384", _FLAT),
        Entry("Spikingformer with CML", "spikingformer_4_384_cml", _FLAT),
        Entry("Spike-driven Transformer", "sdt_2_256", _FLAT),
        Entry("A2OS2A", "a2os2a_2_256", _FLAT),
        Entry("TIM", "tim_2_256", {**_FLAT, "tokens": 64}),
        Entry("SEMM", "semm_4_384", {"embed_dim": 192, "depth": 2, "expert_dim": 32, "pools": "1100"}),
        Entry("AutoST", "autost_4_384", _FLAT),
    ),
}


@dataclass(frozen=True)
class Measured:
    """One trained model."""

    experiment: str  # "comparison_<group>_<data set>"
    variant: str  # name of the entry
    seed: int
    top1: float  # percent, on the test set after the last epoch
    epochs: int
    core_seconds: float  # of training: all threads' processor time, without loading data; nan: it was broken off
    command: str
    params: int
    firing_rate: float  # mean over neurons, on the test set
    energy_mj: float  # of a sample, see `analysis.energy`
    latency_ms: float  # of one sample, deployed in float32, median; nan: not yet measured

    @property
    def key(self) -> tuple[str, str, int]:
        """Of all rows' this one's own."""
        return self.experiment, self.variant, self.seed


def parameters(entry: Entry, in_chans: int = 3, num_classes: int = 10) -> int:
    """Parameters of an entry's model."""
    model = timm.create_model(
        entry.model, device="meta", in_chans=in_chans, num_classes=num_classes, **dict(entry.args)
    )
    return sum(parameter.numel() for parameter in model.parameters())


class _Case(NamedTuple):
    """One training."""

    experiment: str
    entry: Entry
    seed: int
    data_set: str
    data_dir: Path
    folder: Path
    options: tuple[str, ...]

    @property
    def key(self) -> tuple[str, str, int]:
        """What its row is found by, see `Measured.key`."""
        return self.experiment, self.entry.name, self.seed

    @property
    def name(self) -> str:
        """Of the run's own folder."""
        words = "".join(c if c.isalnum() else " " for c in self.entry.name).split()
        return "-".join([self.experiment, *words, str(self.seed)])

    @property
    def runs(self) -> Path:
        return self.folder / "runs"

    @property
    def given(self) -> list[str]:
        """What decides the training, as `timm-qkformer train` takes it."""
        of_recipe = read_yaml(recipe_path(RECIPES[self.data_set]))["model_kwargs"]
        of_model = {**self.entry.args, **{key: of_recipe[key] for key in ("neuron_args", "time_steps")}}
        args = [f"{key}={value!r}".replace(" ", "") for key, value in of_model.items()]
        given = ["-c", RECIPES[self.data_set], "--model", self.entry.model, "--seed", str(self.seed)]
        return [*given, *self.options, "--model-kwargs", *args]

    @property
    def command(self) -> str:
        """Without what says where data and results are."""
        return " ".join(["timm-qkformer", "train", *self.given])


def run_comparison(
    data_set: str,
    data_dir: Path,
    folder: Path,
    groups: Iterable[str] = tuple(GROUPS),
    seeds: Sequence[int] = SEEDS,
    options: Sequence[str] = (),
    entries: Mapping[str, Sequence[Entry]] = GROUPS,
    jobs: int = 1,
) -> list[Measured]:
    """Train and measure what is not yet in `folder`/comparison.json, and write that file after each model.

    Args:
        data_set: One of `RECIPES`.
        data_dir: Its folder, as the recipe takes it.
        folder: Of the results and the trainings.
        groups: Of `entries`.
        seeds: Of the trainings.
        options: More of the trainer's options for all, such as ("--epochs", "6").
        entries: What is compared.
        jobs: Trainings at once. If more than one, each has a process and one thread of its own.

    Raises:
        FileNotFoundError: If there is no folder of data.
        ValueError: For an unknown data set or group, a comparison.json of other settings, or what the trainer refuses.
    """
    if data_set not in RECIPES:
        raise ValueError(f"data_set={data_set!r} is unknown, choose one of {', '.join(RECIPES)}")
    if unknown := [group for group in groups if group not in entries]:
        raise ValueError(f"groups: {unknown[0]!r} is unknown, choose of {', '.join(entries)}")
    if jobs < 1:
        raise ValueError(f"jobs={jobs} must be at least 1")
    if wrong := [seed for seed in seeds if not 0 <= seed < 2**32]:
        raise ValueError(f"seeds: {wrong[0]} must be from 0 to 2^32 - 1")
    if not data_dir.is_dir():
        raise FileNotFoundError(f"data_dir={str(data_dir)!r} is no folder: it must have the data of {data_set}")
    path = folder / "comparison.json"
    rows = read_measured(path)
    done = {row.key for row in rows}
    # Seed by seed, so that what is broken off has whole tables.
    wanted = [
        _Case(f"comparison_{group}_{data_set}", entry, seed, data_set, data_dir, folder, tuple(options))
        for seed in seeds
        for group in groups
        for entry in entries[group]
    ]
    missing = [case for case in wanted if case.key not in done]
    cases = {case.key: case for case in wanted}
    for row in rows:
        if row.key in cases and row.command != cases[row.key].command:
            raise ValueError(f"{path} has another training of {row.variant}, `{row.command}`: choose another folder")
    for row in tqdm(_trained(missing, jobs), total=len(missing), unit="model"):
        rows.append(row)
        _write(rows, path)
    for i, row in enumerate(rows):
        case = cases.get(row.key)
        if case is not None and math.isnan(row.latency_ms):
            rows[i] = replace(row, latency_ms=_latency_of(case))
            _write(rows, path)
    return rows


def read_measured(path: Traversable) -> list[Measured]:
    """Rows of a comparison.json; none where there is no file.

    Raises:
        ValueError: If it holds something else.
    """
    return read_kept(path, "comparison", _as_rows) if path.is_file() else []


def _as_rows(kept: Any) -> list[Measured]:
    if not isinstance(kept, list):
        raise ValueError(f"a {type(kept).__name__}, not a list")
    return [Measured(**row) for row in kept]


def shipped_rows() -> list[Measured]:
    """Rows that come with the package: training/results/comparison/*.json."""
    folder = files("timm_qkformer.training") / "results" / "comparison"
    found = sorted((file for file in folder.iterdir() if file.name.endswith(".json")), key=lambda file: file.name)
    return [row for file in found for row in read_measured(file)]


def _write(rows: Sequence[Measured], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps([asdict(row) for row in rows], indent=1) + "\n")


def _trained(cases: Sequence[_Case], jobs: int) -> Iterator[Measured]:
    """Each case's row, as they come."""
    if jobs == 1:
        yield from map(_train_and_measure, cases)
        return
    fresh = multiprocessing.get_context("spawn")  # threads of torch do not survive a fork
    with ProcessPoolExecutor(jobs, fresh, _begin_worker) as pool:
        futures = [pool.submit(_train_and_measure, case) for case in cases]
        try:
            for future in as_completed(futures):
                yield future.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)  # what has not begun need not
            raise


def _begin_worker() -> None:
    """One thread, and an end when the process that began this one has none any more to report to."""
    torch.set_num_threads(1)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end_with_parent() -> None:
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True, name="end with parent").start()


def _train_and_measure(case: _Case) -> Measured:
    from ..analysis import energy
    from ..training.trainer.config import parse_train
    from ..training.trainer.engine import train

    where = ["--data-dir", str(case.data_dir), "--output", str(case.runs), "--experiment", case.name]
    is_whole = not (case.runs / case.name).exists()
    start = time.process_time()
    result = train(parse_train([*where, "--resume", "auto", *case.given]))
    core_seconds = time.process_time() - start if is_whole else math.nan
    with (result.folder / "summary.csv").open(encoding="utf-8") as file:
        last = list(csv.DictReader(file))[-1]
    model = _last(case)
    x = _samples(model, case.data_set, case.data_dir)
    return Measured(
        case.experiment,
        case.entry.name,
        case.seed,
        float(last["eval_top1"]),
        int(last["epoch"]) + 1,
        core_seconds,
        case.command,
        sum(parameter.numel() for parameter in model.parameters()),
        float(last["firing_rate"] or "nan"),
        energy(model, x).pj / len(x) * 1e-9,
        math.nan,
    )


def _last(case: _Case) -> Any:
    """The trained model."""
    from ..hub.loading import load_model

    return load_model(str(case.runs / case.name / "last.pth.tar")).model.eval()


def _latency_of(case: _Case) -> float:
    """Of one sample, in milliseconds."""
    from ..inference import deploy

    model = _last(case)
    return _latency(deploy(model), _samples(model, case.data_set, case.data_dir)[:1])


def _samples(model: Any, data_set: str, data_dir: Path, count: int = 16) -> torch.Tensor:
    """Test samples as the model takes them, of all classes."""
    from ..analysis.inputs import file_data

    test = data_dir / "test"
    _, samples = file_data(model, test if test.is_dir() else data_dir, count, _SENSOR.get(data_set))
    return torch.cat(list(samples))


@torch.inference_mode()
def _latency(model: Any, x: torch.Tensor, rounds: int = 15) -> float:
    """Milliseconds, the median after a few calls that nobody counts."""
    times = []
    for _ in range(rounds + 3):
        start = time.perf_counter()
        model(x)
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times[3:])


def comparison_section(rows: Sequence[Measured], entries: Mapping[str, Sequence[Entry]] = GROUPS) -> list[str]:
    """Markdown: a table for each data set and group that has been measured; entries that have not are there, too."""
    from .tables import table

    lines = [
        "## Comparison: every attention in one skeleton, every family at one size",
        "",
        "One recipe for all, the same epochs and seeds; ours, not a paper's. Attention: a hierarchy of three stages of "
        "one block, 48, 96 and 192 channels, strides 4, 8 and 16. Families: about 1.2 M parameters each. Top-1 with "
        "the sample standard deviation over the seeds; energy of a sample by synaptic operations; training in seconds "
        "of a core; latency of one sample, deployed in float32, where the models were trained.",
    ]
    words = "parameters | top-1 (%) | firing rate | energy (µJ) | training (core-s) | latency (ms) | seeds"
    for data_set in RECIPES:
        for group, of_group in entries.items():
            found = [row for row in rows if row.experiment == f"comparison_{group}_{data_set}"]
            if not found:
                continue
            body = [_table_row(entry, [row for row in found if row.variant == entry.name]) for entry in of_group]
            lines += ["", f"### {group}, {data_set}", "", *table(f"{group} | {words}", body), ""]
            lines.append(f"Such as `{found[0].command}`, {found[0].epochs} epochs.")
    return lines


def _table_row(entry: Entry, rows: Sequence[Measured]) -> list[str]:
    if not rows:
        return [entry.name, f"{parameters(entry):,}", "not measured", "-", "-", "-", "-", "0"]

    def mean(name: str, digits: str, unit: float = 1.0) -> str:
        known = [value for row in rows if not math.isnan(value := getattr(row, name))]
        return format(statistics.fmean(known) * unit, digits) if known else "-"

    scores = [row.top1 for row in rows]
    spread = f" ± {statistics.stdev(scores):.2f}" if len(scores) > 1 else ""
    return [
        entry.name,
        f"{rows[0].params:,}",
        f"{statistics.fmean(scores):.2f}{spread}",
        mean("firing_rate", ".3f"),
        mean("energy_mj", ".2f", 1e3),
        mean("core_seconds", ".0f"),
        mean("latency_ms", ".1f"),
        str(len(rows)),
    ]
