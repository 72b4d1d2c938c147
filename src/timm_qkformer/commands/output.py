"""What commands print: a summary for people or, with `--json`, one JSON document for scripts."""

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

from ..files import refuse_existing, write_atomically

STDOUT = "-"


def add_json(parser: argparse.ArgumentParser, what: str) -> None:
    """Add `--json [FILE]`."""
    text = f"print {what} as JSON and nothing else, or write it to a new FILE beside the summary"
    parser.add_argument("--json", nargs="?", const=STDOUT, metavar="FILE", help=text)


def refuse_outputs(args: argparse.Namespace, *others: Path | None) -> None:
    """FileExistsError if the FILE of `--json`, or another file that is about to be written, is there already."""
    refuse_existing(*(Path(path) for path in (args.json, *others) if path not in (None, STDOUT)))


def show(args: argparse.Namespace, values: Any, summary: str) -> None:
    """Print the summary or, with `--json`, the values; with `--json FILE` print the one and write the other."""
    text = json.dumps(values, indent=2, default=str) + "\n"
    if args.json == STDOUT:
        sys.stdout.write(text)
        return
    print(summary)
    if args.json is not None:
        path = Path(args.json)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, text)
        print(f"wrote {path}")


@contextmanager
def others_on_stderr(args: argparse.Namespace) -> Iterator[None]:
    """Send what is printed meanwhile to standard error if `--json` has standard output for itself."""
    if args.json == STDOUT:
        with redirect_stdout(sys.stderr):
            yield
    else:
        yield


def add_no_progress(parser: argparse.ArgumentParser) -> None:
    """Add `--no-progress`."""
    parser.add_argument("--no-progress", action="store_true", help="no bar")


@contextmanager
def byte_bar(args: argparse.Namespace, text: str) -> Iterator[Callable[[int, int], None]]:
    """A bar over a file that takes more than a second, on a terminal: call what it gives with bytes read and in all."""
    from tqdm import tqdm

    with tqdm(
        desc=text, unit="B", unit_scale=True, leave=False, delay=1, disable=True if args.no_progress else None
    ) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield progress
