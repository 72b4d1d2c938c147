"""`timm-qkformer ...`: every command is a function elsewhere; this file parses arguments and prints errors."""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from .commands import analysis, reproduction, search
from .commands import export as exporting
from .errors import printable
from .training.trainer.config import add_train_arguments, add_validate_arguments, resolve_train


def _add_demo(parser: argparse.ArgumentParser) -> None:
    pictures = "folder for the pictures (%(default)s)"
    parser.add_argument("--output", type=Path, default=Path("output/demo"), help=pictures)
    parser.add_argument("--epochs", type=int, default=4, help="passes over the training digits (%(default)s)")
    parser.add_argument("--seed", type=int, default=42, help="seed of everything random (%(default)s)")


def _demo(args: argparse.Namespace) -> None:
    from .training.demo import run_demo

    run_demo(args.output, epochs=args.epochs, seed=args.seed)


def _add_convert(parser: argparse.ArgumentParser) -> None:
    source = "checkpoint of the authors' releases or of this package"
    parser.add_argument("source", type=Path, metavar="IN", help=source)
    parser.add_argument("folder", type=Path, metavar="OUT", help="folder to write")
    parser.add_argument("--model", help="registered name, if the tensors alone should not decide")
    parser.add_argument("--time-steps", type=int, metavar="T", help="time steps (default: what the checkpoint says)")
    parser.add_argument("--tag", help="pretrained tag to write down (default: the release's, else custom)")
    parser.add_argument("--input-size", type=int, metavar="PIXELS", help="side of the images it was trained on")
    coupled = "create the model with the release's coupled neurons"
    parser.add_argument("--batch-coupled", action="store_true", help=coupled)
    ema = "take the weights' moving average, or not (default: where there is one)"
    parser.add_argument("--ema", action=argparse.BooleanOptionalAction, help=ema)
    dtypes = ("float16", "float32", "float64")
    parser.add_argument("--dtype", choices=dtypes, default="float32", help="dtype of the tensors (%(default)s)")
    rounding = "round weights to 8 bits, so that int8 deploys answer alike"
    parser.add_argument("--quantize-weights", action="store_true", help=rounding)
    parser.add_argument("--round-weights", dest="quantize_weights", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--verify", type=Path, metavar="DIR", help="measure the accuracy on these images for the card")
    parser.add_argument("--force", action="store_true", help="replace what is in OUT")


def _convert(args: argparse.Namespace) -> None:
    from .hub import convert, verify

    def measure(folder: Path) -> list[dict[str, Any]]:
        return verify(str(folder), args.verify)

    own = ("model", "time_steps", "tag", "input_size", "batch_coupled", "ema", "dtype", "quantize_weights", "force")
    options = {name: getattr(args, name) for name in own}
    done = convert(args.source, args.folder, **options, measure=measure if args.verify else None)
    print("\n".join(map(printable, done.report)))
    folder = printable(str(done.folder))
    print(f"wrote {folder}; load it with timm.create_model('local-dir:{folder}', pretrained=True)")


def _add_verify(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL_OR_FOLDER", help="converted folder, or a name that timm knows")
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="images in folders named by class")
    parser.add_argument("--neurons", choices=("both", "per-sample", "coupled"), default="both")
    parser.add_argument("--time-steps", type=int, metavar="T", help="time steps (default: the model's)")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--limit", type=int, metavar="N", help="take N images, drawn from all classes")
    parser.add_argument("--workers", type=int, default=2, help="processes that decode images")
    parser.add_argument("--device", help="default: cuda if there is one, else cpu")
    parser.add_argument("--progress", type=Path, metavar="FILE", help="keep the counts here and resume from them")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the results as JSON, to a new file")


def _verify(args: argparse.Namespace) -> None:
    from .files import write_atomically
    from .hub import verify

    if args.output is not None and args.output.exists():
        raise FileExistsError(f"--output {args.output} exists already; choose another name")
    own = ("neurons", "time_steps", "batch_size", "limit", "workers", "device", "progress")
    results = verify(args.model, args.data, **{name: getattr(args, name) for name in own})
    for result in results:
        neurons = "coupled" if result["batch_coupled"] else "per sample"
        size = "x".join(map(str, result["input_size"][1:]))
        print(
            f"{neurons:<10}  top-1 {result['top1']:6.2f} %  top-5 {result['top5']:6.2f} %  "
            f"{result['images']:,} images of {size}, T = {result['time_steps']}, "
            f"{result['images_per_second']:.1f} images/s on {result['device']}"
        )
    if args.output is not None:
        write_atomically(args.output, json.dumps(results, indent=2) + "\n")


def _add_publish(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="folder that convert wrote")
    parser.add_argument("repo", metavar="REPO", help="repository on the Hugging Face Hub, NAMESPACE/NAME")
    parser.add_argument("--private", action="store_true", help="make a new repository private")
    parser.add_argument("--yes", action="store_true", help="do not ask")


def _publish(args: argparse.Namespace) -> None:
    from .hub import publish

    def confirm(plan: str) -> bool:
        print(plan)
        if args.yes:
            return True
        if not sys.stdin.isatty():
            raise ValueError("nobody to ask: standard input is not a terminal; --yes uploads without asking")
        return input("Upload? [y/N] ").strip().lower() in ("y", "yes")

    url = publish(args.folder, args.repo, confirm=confirm, private=args.private)
    print(f"uploaded, read back and compared: {url}")
    print(f"load it with timm.create_model('hf-hub:{args.repo}', pretrained=True)")


def _train(args: argparse.Namespace) -> None:
    settings = resolve_train(vars(args))
    from .training.trainer.engine import train  # after the settings are known to be right: it loads torch

    train(settings)


def _validate(args: argparse.Namespace) -> None:
    from .training.trainer.evaluate import resolve_validate, validate

    results = validate(resolve_validate(vars(args)))
    rate = results["firing_rate"]
    print(
        f"top-1 {results['top1']:.3f} %  top-5 {results['top5']:.3f} %  loss {results['loss']:.5f}  "
        f"{results['samples']:,} samples, {results['images_per_second']:.1f} images/s"
        + (f", firing rate {rate:.4f}" if rate is not None else "")
    )


# name: (help, add arguments, run)
Command = tuple[str, Callable[[argparse.ArgumentParser], None], Callable[[argparse.Namespace], None]]
COMMANDS: dict[str, Command] = {
    "demo": ("classify photographs, fine-tune on handwritten digits, look inside", _add_demo, _demo),
    "convert": ("turn an upstream checkpoint into a folder for timm", _add_convert, _convert),
    "train": (
        "train a model on images or events, with timm's train.py's flags and recipes",
        add_train_arguments,
        _train,
    ),
    "validate": ("measure a model's accuracy on images or events", add_validate_arguments, _validate),
    "verify": ("measure top-1 and top-5 accuracy on labelled images", _add_verify, _verify),
    "profile": ("firing rates, energy, memory and speed of a model", analysis.add_profile, analysis.profile),
    "visualize": ("draw a model's attention", analysis.add_visualize, analysis.visualize),
    "export": ("write a model as a graph: ONNX, OpenVINO, torch", exporting.add_export, exporting.export),
    "search": ("search for architectures without training them", search.add_search, search.search),
    "reproduce": ("remake the paper's tables and figures", reproduction.add_reproduce, reproduction.reproduce),
    "publish": ("upload a converted folder to the Hugging Face Hub", _add_publish, _publish),
}
# What the extras bring, by the modules that may be missing.
_EXTRAS = {
    **{"aedat": "events", "sklearn": "demo", "matplotlib": "analysis", "tensorboard": "train"},
    **dict.fromkeys(("onnx", "onnxruntime", "onnxscript", "openvino"), "export"),
}
ALIASES = {"reproduce": ["paper"]}  # what commands were called before


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; errors that the user can act on are one line and exit status 2."""
    parser = argparse.ArgumentParser(prog="timm-qkformer", description="QKFormer spiking transformers for timm")
    parser.add_argument("--version", action=_Version, help="versions of the package and of what it builds on")
    parser.add_argument(
        "--import",
        dest="imports",
        action="append",
        default=[],
        metavar="MODULE",
        help="module of this folder or an installed one to import first: yours, that registers an operator or a neuron",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (text, add_arguments, run) in COMMANDS.items():
        command = commands.add_parser(name, aliases=ALIASES.get(name, []), help=text, description=text)
        add_arguments(command)
        command.set_defaults(run=run)
    args = parser.parse_args(argv)
    try:
        _import(args.imports)
        args.run(args)
    except ModuleNotFoundError as error:
        extra = _EXTRAS.get((error.name or "").partition(".")[0])
        if extra is None:
            raise
        return _fail(f"{error.name} is missing: pip install 'timm-qkformer[{extra}]'")
    except (OSError, ValueError) as error:
        return _fail(str(error))
    except KeyboardInterrupt:
        print("timm-qkformer: interrupted", file=sys.stderr)
        return 130
    return 0


class _Version(argparse.Action):
    """Print versions without importing what has them, and end."""

    def __init__(self, option_strings: Sequence[str], dest: str, help: str | None = None) -> None:
        super().__init__(option_strings, dest, nargs=0, help=help)

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        parts = [f"timm-qkformer {_version_of('timm-qkformer')}", f"Python {sys.version.split()[0]}"]
        parts[1:1] = [f"{name} {_version_of(name)}" for name in ("timm", "torch")]
        print(", ".join(parts))
        parser.exit()


def _version_of(distribution: str) -> str:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return "not installed"


def _import(modules: Sequence[str]) -> None:
    """Import what the command line names. Files (recipes, checkpoints) can name no module."""
    if modules:
        sys.path.insert(0, "")
    for name in modules:
        try:
            import_module(name)
        except ImportError as error:
            raise ValueError(f"--import {name}: {error}") from error


def _fail(message: str) -> int:
    print(f"timm-qkformer: error: {printable(message, keep=chr(10))}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
