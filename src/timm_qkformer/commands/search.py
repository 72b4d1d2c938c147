"""`timm-qkformer search`."""

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .output import add_json, others_on_stderr, refuse_outputs, show

if TYPE_CHECKING:
    from ..search.run import SearchSettings


def add_search(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--space", default="autost-small", metavar="SPACE", help="what to choose from (%(default)s)")
    parser.add_argument("--score", default="flops", metavar="SCORE", help="flops, naswot or spikes (%(default)s)")
    parser.add_argument(
        "--params", type=float, nargs=2, metavar=("LEAST", "MOST"), help="parameters, such as 11e6 12e6 (the space's)"
    )
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder; goes on with what is in it")
    parser.add_argument("--population", type=int, default=50, metavar="N", help="networks in a round (%(default)s)")
    parser.add_argument("--rounds", type=int, default=20, metavar="N", help="after the first population (%(default)s)")
    parser.add_argument("--keep", type=int, default=10, metavar="N", help="parents of the next round (%(default)s)")
    parser.add_argument("--crossovers", type=int, default=25, metavar="N", help="in each round (%(default)s)")
    parser.add_argument("--mutations", type=int, default=25, metavar="N", help="in each round (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="(%(default)s)")
    parser.add_argument(
        "--pattern-weight", type=float, default=0.0, metavar="W", help="of the pattern term in flops (%(default)s)"
    )
    parser.add_argument("--num-classes", type=int, default=10, metavar="N", help="(%(default)s)")
    parser.add_argument("--image-size", type=int, default=32, metavar="PX", help="(%(default)s)")
    parser.add_argument("--time-steps", type=int, default=4, metavar="T", help="(%(default)s)")
    parser.add_argument(
        "--batch", type=int, default=16, metavar="N", help="images to compare patterns of (%(default)s)"
    )
    parser.add_argument(
        "--epochs", type=int, default=0, metavar="N", help="then train each winner for so long; 0: no training"
    )
    parser.add_argument("--data-dir", type=Path, metavar="DIR", help="of the recipe's data set, to train on")
    parser.add_argument(
        "--rank", type=int, metavar="N", help="instead of a search: sample N networks, train each, print Kendall's tau"
    )
    parser.add_argument("--recipe", metavar="NAME", help="what --rank trains with (the space's)")
    parser.add_argument("--no-progress", action="store_true", help="no bar")
    add_json(parser, "the winners, or with --rank the networks,")


def search(args: argparse.Namespace) -> None:
    import matplotlib  # noqa: F401, missing: say so before anything is computed

    from ..search.evolution import Evolution
    from ..search.run import SearchSettings, table
    from ..search.run import search as run

    refuse_outputs(args)
    if args.epochs < 0:
        raise ValueError(f"--epochs {args.epochs} must not be negative")
    if args.epochs and args.data_dir is None:
        raise ValueError("--epochs trains networks: --data-dir says where their data are")
    evolution = Evolution(args.population, args.rounds, args.keep, args.crossovers, args.mutations, args.seed)
    settings = SearchSettings(
        args.space,
        args.score,
        None if args.params is None else (args.params[0], args.params[1]),
        evolution,
        args.pattern_weight,
        args.num_classes,
        args.image_size,
        args.time_steps,
        args.batch,
    )
    if args.rank is not None:
        _rank(args, settings)
        return
    with others_on_stderr(args):
        winners = run(settings, args.output, progress=not args.no_progress)
        if args.epochs:
            _train(args, min(len(winners), args.keep))
    next_step = f"train one with: timm-qkformer train -c {args.output}/winner_01.yaml ..."
    summary = f"{table(winners)}\n\nrecipes and picture: {args.output}; {next_step}"
    show(args, [asdict(winner) for winner in winners], summary)


def _rank(args: argparse.Namespace, settings: "SearchSettings") -> None:
    from ..search.ranking import rank, ranking_table

    if args.rank < 2 or not args.epochs:
        raise ValueError(f"--rank {args.rank} --epochs {args.epochs}: give two networks or more, and epochs to train")
    options = ["--data-dir", str(args.data_dir)]
    with others_on_stderr(args):
        ranked = rank(settings, args.output, args.rank, args.epochs, args.recipe, options)
    show(args, [asdict(row) for row in ranked], ranking_table(ranked))


def _train(args: argparse.Namespace, count: int) -> None:
    from ..training.trainer.config import resolve_train
    from ..training.trainer.engine import train

    for number in range(1, count + 1):
        config = args.output / f"winner_{number:02}.yaml"
        options: dict[str, Any] = {
            "config": str(config),
            "data_dir": str(args.data_dir),
            "epochs": args.epochs,
            "warmup_epochs": min(1, args.epochs - 1),
            "cooldown_epochs": 0,
            "output": str(args.output / "trained"),
            "experiment": config.stem,
        }
        train(resolve_train(options))
