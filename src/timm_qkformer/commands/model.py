"""The model of a command: the options that name it and its weights, and how it is loaded."""

import argparse
import ast
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..hub.loading import LoadedModel


def add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model", metavar="MODEL", help="registered name, converted folder, local-dir:FOLDER, hf-hub:REPO or checkpoint"
    )


def add_sensor_size(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--sensor-size",
        type=int,
        nargs=2,
        metavar=("HEIGHT", "WIDTH"),
        help="of the event camera, where the file does not state it",
    )


def add_device(parser: argparse.ArgumentParser) -> None:
    text = "auto, cpu, cuda, cuda:1, ...; auto is cuda if there is one, else cpu (%(default)s)"
    parser.add_argument("--device", default="auto", metavar="DEVICE", help=text)


def add_model_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--checkpoint", type=Path, metavar="FILE", help="weights for a registered MODEL")
    parser.add_argument(
        "--model-kwargs", nargs="+", default=[], metavar="KEY=VALUE", help="arguments of the model, such as in_chans=1"
    )
    parser.add_argument("--random", action="store_true", help="random weights, even if there are pretrained ones")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random weights (%(default)s)")
    parser.add_argument("--time-steps", type=int, metavar="T", help="time steps (default: the model's)")


def load(args: argparse.Namespace, source: str | None = None) -> "LoadedModel":
    """The model that `args.model` or `source` names, with what the options of `add_model_options` say.

    OSError if its weights cannot be had, ValueError for options that do not go together.
    """
    from ..execution import keep_freed_memory
    from ..hub.loading import load_model
    from ..models.loading import WeightsError

    keep_freed_memory()
    try:
        return load_model(
            source or args.model,
            checkpoint=args.checkpoint,
            random=args.random,
            seed=args.seed,
            time_steps=args.time_steps,
            model_args=keyword_arguments(args.model_kwargs),
        )
    except WeightsError as error:
        raise OSError(f"{error} Or look at an untrained model with --random.") from error


def keyword_arguments(pairs: Sequence[str]) -> dict[str, Any]:
    """KEY=VALUE, where VALUE is a Python literal, else text."""
    result: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key.isidentifier():
            raise ValueError(f"--model-kwargs {pair}: give KEY=VALUE")
        try:
            result[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            result[key] = value
    return result
