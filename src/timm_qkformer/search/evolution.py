"""Evolution of genomes: AutoST's (arXiv 2307.00293, the release's evolution.py), for any space and score.

A first population is drawn; each round keeps the best of all so far, mutates and crosses them, and fills up with random
genomes. A search is a function of its settings: every round draws from a generator of its own, and what was computed is
kept by genome. So an interrupted search that starts again with what it kept draws the same genomes, waits for none that
is known, and ends with the same result.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from random import Random
from typing import Any

from .spaces import Genome, Space

_CROSS_TRIES = 50  # for two parents of the same depth
_TRIES = 10  # genomes drawn for one mutation or crossover that is wanted
VAIN_TRIES = 1000  # random genomes in a row that are known or too small or large, until no more are drawn


@dataclass(frozen=True)
class Evolution:
    """Settings; the defaults are AutoST's.

    Attributes:
        population: Genomes in a round.
        rounds: Rounds after the first population.
        keep: The best that parents are chosen from.
        crossovers, mutations: Children of each kind in a round.
        seed: Of all that is drawn.
    """

    population: int = 50
    rounds: int = 20
    keep: int = 10
    crossovers: int = 25
    mutations: int = 25
    seed: int = 0

    def __post_init__(self) -> None:
        least = {"population": 1, "rounds": 0, "keep": 1, "crossovers": 0, "mutations": 0}
        for name, minimum in least.items():
            if getattr(self, name) < minimum:
                raise ValueError(f"{name}={getattr(self, name)} must be at least {minimum}")
        if self.crossovers + self.mutations > self.population:
            raise ValueError(
                f"crossovers={self.crossovers} and mutations={self.mutations} must not be more than "
                f"population={self.population} together"
            )

    @property
    def evaluations(self) -> int:
        """Genomes that a search scores."""
        return self.population * (self.rounds + 1)


@dataclass(frozen=True)
class Candidate:
    """A genome, what its network has, and the round that found it, from 0."""

    genome: Genome
    params: int
    score: float
    round: int


@dataclass
class SearchState:
    """What was computed, by genome: parameters and, once it was needed, the score."""

    params: dict[str, int] = field(default_factory=dict)
    scores: dict[str, float] = field(default_factory=dict)


def key_of(genome: Genome) -> str:
    """The genome as text, equal for equal genomes."""
    return json.dumps(genome, sort_keys=True)


def evolve(
    space: Space,
    params: tuple[float, float],
    count_params: Callable[[Genome], int],
    score: Callable[[Genome], float],
    settings: Evolution = Evolution(),
    state: SearchState | None = None,
    on_candidate: Callable[[Candidate], None] = lambda candidate: None,
) -> list[Candidate]:
    """Search a space.

    Args:
        space: The space.
        params: Least and most parameters that a network may have.
        count_params: Parameters of a genome's network.
        score: Its score, the higher the better.
        settings: See `Evolution`.
        state: What is known already, and what will be known.
        on_candidate: Called with each candidate when its score is known.

    Returns:
        All candidates, in the order in which they were found.

    Raises:
        ValueError: If no network with so many parameters is found.
    """
    search = _Search(space, params, count_params, score, SearchState() if state is None else state)
    found: list[Candidate] = []
    for number in range(settings.rounds + 1):
        random = Random(f"{settings.seed}/{number}")
        best = sorted(found, key=lambda candidate: -candidate.score)[: settings.keep]
        for genome in search.population(best, settings, random):
            found.append(search.evaluate(genome, number))
            on_candidate(found[-1])
    return found


def wanted(draw: Callable[[], Genome], is_wanted: Callable[[Genome], bool]) -> Iterator[Genome]:
    """What is drawn and wanted, until `VAIN_TRIES` draws in a row were not."""
    vain = 0
    while vain < VAIN_TRIES:
        genome = draw()
        vain += 1
        if is_wanted(genome):
            yield genome
            vain = 0


@dataclass
class _Search:
    space: Space
    limits: tuple[float, float]
    count_params: Callable[[Genome], int]
    score: Callable[[Genome], float]
    state: SearchState
    visited: set[str] = field(default_factory=set)

    def population(self, best: list[Candidate], settings: Evolution, random: Random) -> list[Genome]:
        """A round's genomes: children of the best, if there are any, then random ones."""
        genomes: list[Genome] = []
        if best:
            for count, child in ((settings.mutations, self._mutant), (settings.crossovers, self._crossed)):
                draws = (child(best, random) for _ in range(_TRIES * count))
                genomes += islice(filter(self._is_wanted, draws), count)
        missing = settings.population - len(genomes)
        genomes += islice(wanted(lambda: self.space.sample(random), self._is_wanted), missing)
        if not genomes:
            seen = self.state.params.values()
            raise ValueError(
                f"params={self.limits[0]:g} to {self.limits[1]:g}: {len(self.visited)} networks of the space were "
                f"drawn and have {min(seen, default=0):,} to {max(seen, default=0):,}"
            )
        return genomes

    def evaluate(self, genome: Genome, number: int) -> Candidate:
        key = key_of(genome)
        if key not in self.state.scores:
            self.state.scores[key] = self.score(genome)
        return Candidate(genome, self.state.params[key], self.state.scores[key], number)

    def _mutant(self, best: list[Candidate], random: Random) -> Genome:
        return self.space.mutate(random.choice(best).genome, random)

    def _crossed(self, best: list[Candidate], random: Random) -> Genome:
        for _ in range(_CROSS_TRIES):
            one, other = random.choice(best).genome, random.choice(best).genome
            if self.space.alike(one, other):
                break
        return self.space.cross(one, other, random)

    def _is_wanted(self, genome: Genome) -> bool:
        key = key_of(genome)
        if key in self.visited:
            return False
        self.visited.add(key)
        if key not in self.state.params:
            self.state.params[key] = self.count_params(genome)
        return self.limits[0] <= self.state.params[key] <= self.limits[1]


def pareto_front(candidates: list[Candidate], cost: Callable[[Candidate], Any]) -> list[Candidate]:
    """Those that no other one beats in score without costing more, cheapest first."""
    front: list[Candidate] = []
    for candidate in sorted(candidates, key=lambda c: (cost(c), -c.score)):
        if not front or candidate.score > front[-1].score:
            front.append(candidate)
    return front
