"""`timm-qkformer ...`: every command is a function elsewhere; this file parses arguments and prints errors."""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Optional

__all__ = ["main"]


def _add_demo(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", type=Path, default=Path("output/demo"), help="folder for the picture (%(default)s)")
    parser.add_argument("--epochs", type=int, default=12, help="passes over the training digits (%(default)s)")
    parser.add_argument("--seed", type=int, default=42, help="seed of everything random (%(default)s)")


def _demo(args: argparse.Namespace) -> None:
    from .training.demo import run_demo

    run_demo(args.output, epochs=args.epochs, seed=args.seed)


# name: (help, add arguments, run)
Command = tuple[str, Callable[[argparse.ArgumentParser], None], Callable[[argparse.Namespace], None]]
COMMANDS: dict[str, Command] = {
    "demo": ("train a small model on handwritten digits and look inside", _add_demo, _demo),
}


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Run a command; errors that the user can act on are one line and exit status 2."""
    parser = argparse.ArgumentParser(prog="timm-qkformer", description="QKFormer spiking transformers for timm")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (text, add_arguments, run) in COMMANDS.items():
        command = commands.add_parser(name, help=text, description=text)
        add_arguments(command)
        command.set_defaults(run=run)
    args = parser.parse_args(argv)
    try:
        args.run(args)
    except ModuleNotFoundError as error:
        extra = {"sklearn": "demo", "matplotlib": "demo", "tqdm": "demo"}.get((error.name or "").partition(".")[0])
        if extra is None:
            raise
        return _fail(f"{error.name} is missing: pip install 'timm-qkformer[{extra}]'")
    except (OSError, ValueError) as error:
        return _fail(str(error))
    return 0


def _fail(message: str) -> int:
    print(f"timm-qkformer: error: {message}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
