"""Whether a score ranks networks as their trained accuracies do: Kendall's tau of a few, with its interval."""

import csv
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import Any

import torch
import yaml

from ..files import read_kept, write_atomically
from ..training.recipes import recipe_path
from .evolution import wanted
from .run import SearchSettings, build
from .scores import SCORES, score_model
from .spaces import SPACES, Genome

_NORMAL_95 = 1.959963984540054


@dataclass(frozen=True)
class Ranked:
    """A sampled network: genes, parameters, untrained scores by name, and the accuracy that it was trained to."""

    genome: dict[str, Any]
    params: int
    scores: dict[str, float]
    top1: float


def kendall_tau(x: Sequence[float], y: Sequence[float]) -> float:
    """Kendall's tau-b of two rankings, from -1 to 1; 0 where one of them is constant.

    Raises:
        ValueError: For different lengths, or less than two.
    """
    if len(x) != len(y) or len(x) < 2:
        raise ValueError(f"{len(x)} and {len(y)} values: give two or more, of both")
    both = only_x = only_y = 0.0
    for i in range(len(x)):
        for j in range(i):
            a, b = (x[i] > x[j]) - (x[i] < x[j]), (y[i] > y[j]) - (y[i] < y[j])
            both, only_x, only_y = both + a * b, only_x + abs(a), only_y + abs(b)
    return both / math.sqrt(only_x * only_y) if only_x and only_y else 0.0


def tau_interval(tau: float, count: int) -> tuple[float, float]:
    """95 % interval of a tau of `count` pairs: atanh(tau) is nearly normal with variance 0.437 / (count - 4).

    Fieller, Hartley and Pearson, "Tests for rank correlation coefficients", Biometrika 44 (1957).

    Raises:
        ValueError: For less than 5 pairs, of which it says nothing.
    """
    if count < 5:
        raise ValueError(f"count={count}: an interval needs 5 networks or more")
    middle = math.atanh(max(-1 + 1e-9, min(1 - 1e-9, tau)))
    spread = _NORMAL_95 * math.sqrt(0.437 / (count - 4))
    return math.tanh(middle - spread), math.tanh(middle + spread)


def sample(settings: SearchSettings, count: int) -> list[Genome]:
    """Networks of a space within its limits, each once, drawn evenly with the settings' seed.

    Raises:
        ValueError: If there are not so many.
    """
    space, random = SPACES[settings.space], Random(settings.evolution.seed)
    least, most = settings.params or space.params
    found: list[Genome] = []

    def is_wanted(genome: Genome) -> bool:
        return genome not in found and least <= _params(settings, genome) <= most

    for genome in wanted(lambda: space.sample(random), is_wanted):
        found.append(genome)
        if len(found) == count:
            return found
    raise ValueError(f"params={least:.3g} to {most:.3g}: {len(found)} networks of {settings.space} found, not {count}")


def _params(settings: SearchSettings, genome: Genome) -> int:
    return sum(p.numel() for p in build(SPACES[settings.space], genome, settings, "meta").parameters())


def rank(
    settings: SearchSettings,
    folder: Path,
    count: int,
    epochs: int,
    recipe: str | None = None,
    options: Sequence[str] = (),
) -> list[Ranked]:
    """Sample networks, train each, and keep their scores and accuracies.

    `folder`/ranking.json has what is done; the same call goes on from it. Trainings resume, too.

    Args:
        settings: The space, its limits, image size, time steps and seed.
        folder: Of the results and the trainings.
        count: Networks.
        epochs: Of each training, one of them at most to warm up.
        recipe: Name of a recipe; None: the space's.
        options: The trainer's options for all, such as ("--data-dir", "DATA").

    Raises:
        ValueError: For a folder of another ranking, or what the trainer refuses.
    """
    path = folder / "ranking.json"
    stated = json.loads(
        json.dumps({"settings": asdict(settings), "recipe": recipe, "epochs": epochs, "options": list(options)})
    )
    ranked: list[Ranked] = []
    if path.exists():
        settings_of, ranked = read_kept(
            path, "ranking", lambda kept: (kept["stated"], [Ranked(**row) for row in kept["networks"]])
        )
        if settings_of != stated:
            raise ValueError(f"{path} is of a ranking with other settings: choose another folder")
    folder.mkdir(parents=True, exist_ok=True)
    for number, genome in enumerate(sample(settings, count)[len(ranked) :], start=len(ranked) + 1):
        top1 = _train(settings, folder, genome, f"network_{number:02}", epochs, recipe, options)
        ranked.append(Ranked(dict(genome), _params(settings, genome), _scores(settings, genome), top1))
        rows = [asdict(row) for row in ranked]
        write_atomically(path, json.dumps({"stated": stated, "networks": rows}, indent=1) + "\n")
    return ranked


def _scores(settings: SearchSettings, genome: Genome) -> dict[str, float]:
    size = (settings.batch, 3, settings.image_size, settings.image_size)
    images = torch.randn(size, generator=torch.Generator().manual_seed(settings.evolution.seed))
    model = build(SPACES[settings.space], genome, settings)
    return {name: score_model(model, images, name) for name in SCORES}


def _train(
    settings: SearchSettings,
    folder: Path,
    genome: Genome,
    name: str,
    epochs: int,
    recipe: str | None,
    options: Sequence[str],
) -> float:
    from ..training.trainer.config import parse_train
    from ..training.trainer.engine import train

    space = SPACES[settings.space]
    values = yaml.safe_load(recipe_path(recipe or space.recipe).read_text(encoding="utf-8"))
    arguments = {"time_steps": settings.time_steps, **space.arguments(genome)}
    values |= {"model": space.model, "num_classes": settings.num_classes, "model_kwargs": arguments}
    warm_up = min(1, epochs - 1, values.get("warmup_epochs", 0))
    values |= {"epochs": epochs, "warmup_epochs": warm_up, "cooldown_epochs": 0}
    values["model_ema"] = False  # an average lags behind in a short training, to the point of silence
    config = folder / f"{name}.yaml"
    write_atomically(config, yaml.safe_dump(values, sort_keys=False, default_flow_style=None))
    where = ["-c", str(config), "--output", str(folder / "trained"), "--experiment", name, "--resume", "auto"]
    result = train(parse_train([*where, *options]))
    with (result.folder / "summary.csv").open(encoding="utf-8") as file:
        return float(list(csv.DictReader(file))[-1]["eval_top1"])


def ranking_table(ranked: Sequence[Ranked]) -> str:
    """The networks, best first, and each score's tau with its interval, as text."""
    lines = [f"{'top-1 %':>8}  {'M params':>8}  " + "  ".join(f"{name:>9}" for name in SCORES)]
    for row in sorted(ranked, key=lambda row: -row.top1):
        scores = "  ".join(f"{row.scores[name]:9.4g}" for name in SCORES)
        lines.append(f"{row.top1:8.2f}  {row.params / 1e6:8.2f}  {scores}")
    accuracies = [row.top1 for row in ranked]
    by_name = {name: [row.scores[name] for row in ranked] for name in SCORES}
    by_name["parameters"] = [float(row.params) for row in ranked]
    for name, scores_of in by_name.items():
        tau = kendall_tau(scores_of, accuracies)
        interval = "" if len(ranked) < 5 else " (95 %: {:+.2f} to {:+.2f})".format(*tau_interval(tau, len(ranked)))
        lines.append(f"Kendall's tau of {name} and top-1: {tau:+.2f}{interval}, {len(ranked)} networks")
    return "\n".join(lines)
