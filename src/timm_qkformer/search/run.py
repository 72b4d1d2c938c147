"""A search from its settings to a folder: state, table, picture, and the winners as recipes."""

import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import timm
import torch
import yaml
from torch import Tensor

from ..analysis.energy import energy
from ..analysis.hooks import recalibrated_norms
from ..files import read_kept, write_atomically
from ..progress import Bar
from ..training.recipes import recipe_path
from .evolution import Candidate, Evolution, SearchState, evolve, pareto_front
from .scores import SCORES, score_model
from .spaces import SPACES, Genome, Space

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STATE = "search.json"
_SAVE_EVERY = 10.0  # seconds


@dataclass(frozen=True)
class SearchSettings:
    """What a search depends on.

    Attributes:
        space: One of `SPACES`.
        score: One of `SCORES`.
        params: Least and most parameters.
        evolution: See `Evolution`.
        pattern_weight: See `score_model`.
        num_classes, image_size, time_steps: Of the networks.
        batch: Images that patterns are compared among, noise.
    """

    space: str = "autost-small"
    score: str = "flops"
    params: tuple[float, float] | None = None
    evolution: Evolution = field(default_factory=Evolution)
    pattern_weight: float = 0.0
    num_classes: int = 10
    image_size: int = 32
    time_steps: int = 4
    batch: int = 16

    def __post_init__(self) -> None:
        for name, known in (("space", SPACES), ("score", SCORES)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}={getattr(self, name)!r} is unknown, choose one of {', '.join(known)}")
        if self.params is not None and not 0 <= self.params[0] <= self.params[1]:
            raise ValueError(f"params={self.params} must be the least and the most, in this order")
        if not math.isfinite(self.pattern_weight):
            raise ValueError(f"pattern_weight={self.pattern_weight} must be a finite number")
        for name, least in {"num_classes": 1, "image_size": 1, "time_steps": 1, "batch": 2}.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)} must be at least {least}")


@dataclass(frozen=True)
class Winner:
    """One of the best candidates, with what its untrained network costs."""

    candidate: Candidate
    picojoules: float  # of a sample of noise, see `analysis.energy`


def build(space: Space, genome: Genome, settings: SearchSettings, device: str = "cpu") -> Any:
    """The genome's network, of the seed's random weights."""
    torch.manual_seed(settings.evolution.seed)
    own = {"num_classes": settings.num_classes, "time_steps": settings.time_steps, "device": device}
    return timm.create_model(space.model, **own, **space.arguments(genome)).eval()


def search(settings: SearchSettings, folder: Path, images: Tensor | None = None, progress: bool = True) -> list[Winner]:
    """Run a search, or go on with one, and write its folder.

    The folder gets `search.json` (all that was computed; a search with the same settings goes on from it),
    `candidates.csv`, `pareto.png` and a recipe for each winner.

    Args:
        settings: See `SearchSettings`.
        folder: Where to write.
        images: A batch [B, 3, H, W] for scores that look at patterns and for energy, normalised; noise if None.
        progress: Show a bar.

    Returns:
        The `keep` best candidates and those of the Pareto front of score against parameters, best first.

    Raises:
        ValueError: For a folder of another search, or if no network has so many parameters.
    """
    space = SPACES[settings.space]
    stated = json.loads(json.dumps(asdict(settings)))
    state = _read(folder / STATE, stated)
    if images is None:
        size = (settings.batch, 3, settings.image_size, settings.image_size)
        images = torch.randn(size, generator=torch.Generator().manual_seed(settings.evolution.seed))

    # What is counted and not run needs no weights.
    device = "meta" if settings.score == "flops" and not settings.pattern_weight else "cpu"

    def score(genome: Genome) -> float:
        model = build(space, genome, settings, device)
        return score_model(model, images.to(device), settings.score, settings.pattern_weight)

    def params(genome: Genome) -> int:
        return sum(p.numel() for p in build(space, genome, settings, "meta").parameters())

    def save() -> None:
        write_atomically(folder / STATE, json.dumps({"settings": stated, **asdict(state)}))

    folder.mkdir(parents=True, exist_ok=True)
    with Bar(total=settings.evolution.evaluations, unit="net", disable=not progress) as bar:
        best, saved = float("-inf"), time.monotonic()

        def count(candidate: Candidate) -> None:
            nonlocal best, saved
            best = max(best, candidate.score)
            bar.set_postfix(round=candidate.round, best=f"{best:.4g}", refresh=False)
            bar.update()
            if time.monotonic() - saved >= _SAVE_EVERY:
                save()
                saved = time.monotonic()

        try:
            limits = settings.params or space.params
            found = evolve(space, limits, params, score, settings.evolution, state, count)
        finally:
            if state.params:
                save()
    ranked = sorted(found, key=lambda candidate: -candidate.score)
    front = pareto_front(found, lambda candidate: candidate.params)
    chosen = ranked[: settings.evolution.keep]
    chosen += [candidate for candidate in reversed(front) if candidate not in chosen]
    winners = []
    for candidate in Bar(chosen, desc="energy", unit="net", disable=not progress):
        model = build(space, candidate.genome, settings)
        with recalibrated_norms(model, [images]):
            winners.append(Winner(candidate, energy(model, images[:1]).pj))
    _write(folder, settings, space, ranked, winners)
    return winners


def _read(path: Path, stated: dict[str, Any]) -> SearchState:
    if not path.exists():
        return SearchState()
    settings, state = read_kept(path, "state of a search", _as_state)
    if settings != stated:
        differ = ", ".join(_differences(settings, stated))
        raise ValueError(f"{path} is of a search with other settings ({differ}): choose another folder")
    return state


def _as_state(kept: Any) -> tuple[dict[str, Any], SearchState]:
    """Settings and state out of what a state file holds."""
    settings, params, scores = dict(kept["settings"]), kept["params"], kept["scores"]
    numbers = all(type(count) is int for count in params.values())
    if not (numbers and all(type(score) in (int, float) for score in scores.values())):
        raise ValueError("what it keeps are no numbers")
    return settings, SearchState(params, scores)


def _differences(settings: Any, stated: Mapping[str, Any]) -> list[str]:
    """Names of settings that differ, with those of groups instead of the groups."""
    names: list[str] = []
    for name, value in stated.items():
        found = settings.get(name) if isinstance(settings, dict) else None
        if found != value:
            names += _differences(found, value) if isinstance(value, dict) else [name]
    return names


def _write(
    folder: Path, settings: SearchSettings, space: Space, ranked: Sequence[Candidate], winners: Sequence[Winner]
) -> None:
    header = ["score", "params", "round", *space.genes]
    lines = [",".join(header)]
    for candidate in ranked:
        genes = (json.dumps(candidate.genome[name]).replace(", ", " ") for name in space.genes)
        lines.append(",".join([f"{candidate.score:.6g}", str(candidate.params), str(candidate.round), *genes]))
    write_atomically(folder / "candidates.csv", "\n".join(lines) + "\n")
    for number, winner in enumerate(winners, start=1):
        write_atomically(folder / f"winner_{number:02}.yaml", recipe(settings, space, winner, number))
    figure = draw(settings, ranked, winners)
    figure.savefig(folder / "pareto.png", dpi=150)


def recipe(settings: SearchSettings, space: Space, winner: Winner, number: int) -> str:
    """The recipe that the space names, for a winner's network: ready for `timm-qkformer train -c`."""
    values = yaml.safe_load(recipe_path(space.recipe).read_text(encoding="utf-8"))
    arguments = {"time_steps": settings.time_steps, **space.arguments(winner.candidate.genome)}
    values |= {"model": space.model, "num_classes": settings.num_classes, "model_kwargs": arguments}
    head = (
        f"# Number {number} of a search: space {settings.space}, score {settings.score} "
        f"({winner.candidate.score:.6g}), seed {settings.evolution.seed}; {winner.candidate.params:,} parameters.\n"
        f"# Trained as the recipe {space.recipe}, which has the sources of all values.\n"
    )
    return head + yaml.safe_dump(values, sort_keys=False, default_flow_style=None)


def table(winners: Sequence[Winner]) -> str:
    """The winners as text."""
    rows = [("", "score", "M parameters", "mJ", "found in round", "genes")]
    for number, winner in enumerate(winners, start=1):
        candidate = winner.candidate
        genes = " ".join(f"{name}={value}".replace(" ", "") for name, value in candidate.genome.items())
        energy_mj = f"{winner.picojoules * 1e-9:.3f}"
        rows.append(
            (
                f"{number}",
                f"{candidate.score:.4g}",
                f"{candidate.params / 1e6:.2f}",
                energy_mj,
                f"{candidate.round}",
                genes,
            )
        )
    widths = [max(len(row[i]) for row in rows) for i in range(5)]
    return "\n".join("  ".join([*(c.rjust(w) for c, w in zip(row, widths, strict=False)), row[5]]) for row in rows)


def draw(settings: SearchSettings, candidates: Sequence[Candidate], winners: Sequence[Winner]) -> "Figure":
    """Score against parameters, of all candidates, and against energy, of the winners, with the Pareto fronts."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    left.scatter([c.params / 1e6 for c in candidates], [c.score for c in candidates], s=6, c="#9aa7b1", label="all")
    front = pareto_front(list(candidates), lambda c: c.params)
    left.plot([c.params / 1e6 for c in front], [c.score for c in front], "o-", ms=4, c="#b03a2e", label="Pareto front")
    left.set_xlabel("parameters (M)")
    left.set_ylabel(f"score: {settings.score}")
    left.legend(frameon=False)
    joules = {id(winner.candidate): winner.picojoules * 1e-9 for winner in winners}
    chosen = [winner.candidate for winner in winners]
    right.scatter([joules[id(c)] for c in chosen], [c.score for c in chosen], s=14, c="#9aa7b1", label="winners")
    front = pareto_front(chosen, lambda c: joules[id(c)])
    right.plot([joules[id(c)] for c in front], [c.score for c in front], "o-", ms=4, c="#b03a2e", label="Pareto front")
    right.set_xlabel("energy of a sample, untrained (mJ)")
    right.legend(frameon=False)
    figure.suptitle(f"{settings.space}: {len(candidates)} networks")
    return figure
