"""What a search may choose: genes with their values, and the model arguments that a genome stands for.

AutoST's three spaces (arXiv 2307.00293; the release's experiments/search_space) choose a width, a depth, and for each
block its heads and MLP ratio. "hst" chooses the same for the stages of a hierarchical model, and operators and neurons
with them.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

# Values by gene; lists for genes that a model has several of.
Genome = dict[str, Any]

# Mutation rates of AutoST's evolution: of each block's genes, and of the width and the depth.
BLOCK_RATE, STRUCTURE_RATE = 0.2, 0.4


@dataclass(frozen=True)
class Gene:
    """One choice.

    Attributes:
        values: What there is to choose from.
        rate: Probability that a mutation chooses anew, for each element.
        count: How many there are: None for one value, a number, or the name of the gene that says how many.
    """

    values: tuple[Any, ...]
    rate: float
    count: int | str | None = None


@dataclass(frozen=True)
class Space:
    """A search space.

    Attributes:
        model: Registered name of the model.
        genes: By name; a gene that others are counted by comes before them.
        arguments: Model arguments of a genome.
        recipe: Recipe that its networks are trained with.
        params: Parameters (from, to) unless the caller says otherwise.
    """

    model: str
    genes: Mapping[str, Gene]
    arguments: Callable[[Genome], dict[str, Any]]
    recipe: str
    params: tuple[float, float]

    def sample(self, random: Random) -> Genome:
        """A genome, all genes drawn evenly."""
        genome: Genome = {}
        for name, gene in self.genes.items():
            count = _count(gene, genome)
            genome[name] = random.choice(gene.values) if count is None else random.choices(gene.values, k=count)
        return genome

    def mutate(self, genome: Genome, random: Random) -> Genome:
        """A copy in which each gene is chosen anew with its rate; what a greater depth adds is drawn evenly."""
        mutant: Genome = {}
        for name, gene in self.genes.items():
            count = _count(gene, mutant)
            if count is None:
                mutant[name] = random.choice(gene.values) if random.random() < gene.rate else genome[name]
                continue
            kept = [random.choice(gene.values) if random.random() < gene.rate else v for v in genome[name][:count]]
            mutant[name] = kept + random.choices(gene.values, k=count - len(kept))
        return mutant

    def cross(self, one: Genome, other: Genome, random: Random) -> Genome:
        """A child that takes each gene, or element of a gene, from either parent, evenly among those that have it."""
        child: Genome = {}
        for name, gene in self.genes.items():
            count = _count(gene, child)
            if count is None:
                child[name] = random.choice((one[name], other[name]))
                continue
            sources = [[parent[name] for parent in (one, other) if len(parent[name]) > i] for i in range(count)]
            child[name] = [random.choice(having)[i] for i, having in enumerate(sources)]
        return child

    def alike(self, one: Genome, other: Genome) -> bool:
        """Whether two genomes have equally many of each gene."""
        return all(len(one[name]) == len(other[name]) for name, gene in self.genes.items() if gene.count is not None)


def _count(gene: Gene, genome: Genome) -> int | None:
    return int(genome[gene.count]) if isinstance(gene.count, str) else gene.count


def _autost(width: Sequence[int], depth: Sequence[int], ratios: Sequence[int], params: tuple[float, float]) -> Space:
    genes = {
        "depth": Gene(tuple(depth), STRUCTURE_RATE),
        "mlp_ratio": Gene(tuple(ratios), BLOCK_RATE, "depth"),
        "num_heads": Gene((4, 8), BLOCK_RATE, "depth"),
        "embed_dim": Gene(tuple(width), STRUCTURE_RATE),
    }

    def arguments(genome: Genome) -> dict[str, Any]:
        return {name: genome[name] for name in ("embed_dim", "depth", "num_heads", "mlp_ratio")}

    return Space("autost_4_384", genes, arguments, "autost_cifar10", params)


def _hst_arguments(genome: Genome) -> dict[str, Any]:
    width = genome["width"]
    args = {"embed_dims": [width, 2 * width, 4 * width], "patch_embed": genome["patch_embed"]}
    return args | {name: genome[name] for name in ("depths", "num_heads", "mlp_ratio", "attn", "neuron")}


_HST = Space(
    "qkformer_hst4_384",
    {
        "width": Gene(tuple(range(32, 129, 16)), STRUCTURE_RATE),
        "patch_embed": Gene(("cifar", "small"), STRUCTURE_RATE),
        "neuron": Gene(("lif", "plif"), STRUCTURE_RATE),
        "depths": Gene((1, 2, 3, 4), STRUCTURE_RATE, 3),
        "num_heads": Gene((4, 8), BLOCK_RATE, 3),
        "mlp_ratio": Gene((2, 3, 4, 5), BLOCK_RATE, 3),
        "attn": Gene(("qkta", "qkca", "ssa", "sdsa", "ff_lidiff", "dwc3", "dwc5"), BLOCK_RATE, 3),
    },
    _hst_arguments,
    "cifar10",
    (5e6, 8e6),
)

SPACES: dict[str, Space] = {
    "autost-tiny": _autost(range(192, 385, 64), range(1, 11), (3, 4, 5), (1e6, 12e6)),
    "autost-small": _autost(range(256, 513, 64), range(2, 13), (3, 4, 5), (11e6, 12e6)),
    "autost-base": _autost(range(384, 769, 64), range(4, 16), (3, 4, 5, 6), (11e6, 60e6)),
    "hst": _HST,
}
