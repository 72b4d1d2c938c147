"""`timm-qkformer ...`: every command is a function elsewhere; this file parses arguments and prints errors."""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from .commands import analysis, app, doctor, events, reproduction, search, streaming
from .commands import export as exporting
from .commands.help import EXIT_STATUS, HelpFormatter, PrintCompletion, examples
from .commands.model import add_device
from .commands.output import add_json, refuse_outputs, show
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
    given = "arguments of the model that tensors do not show, such as num_heads=8"
    parser.add_argument("--model-kwargs", nargs="+", default=[], metavar="KEY=VALUE", help=given)
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
    add_json(parser, "folder and report")


def _convert(args: argparse.Namespace) -> None:
    from .commands.model import keyword_arguments
    from .hub import convert, verify

    refuse_outputs(args)

    def measure(folder: Path) -> list[dict[str, Any]]:
        return verify(str(folder), args.verify)

    own = ("model", "time_steps", "tag", "input_size", "batch_coupled", "ema", "dtype", "quantize_weights", "force")
    options = {name: getattr(args, name) for name in own}
    options["model_args"] = keyword_arguments(args.model_kwargs)
    done = convert(args.source, args.folder, **options, measure=measure if args.verify else None)
    folder = printable(str(done.folder))
    load = f"wrote {folder}; load it with timm.create_model('local-dir:{folder}', pretrained=True)"
    lines = [printable(line) for line in done.report]
    show(args, {"folder": str(done.folder), "report": list(done.report)}, "\n".join([*lines, load]))


def _add_verify(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL_OR_FOLDER", help="converted folder, or a name that timm knows")
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="images in folders named by class")
    parser.add_argument("--neurons", choices=("both", "per-sample", "coupled"), default="both")
    parser.add_argument("--time-steps", type=int, metavar="T", help="time steps (default: the model's)")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--limit", type=int, metavar="N", help="take N images, drawn from all classes")
    parser.add_argument("--workers", type=int, default=2, help="processes that decode images")
    add_device(parser)
    parser.add_argument("--progress", type=Path, metavar="FILE", help="keep the counts here and resume from them")
    parser.add_argument("--output", dest="json", metavar="FILE", help="the same as --json FILE")
    add_json(parser, "the results")


def _verify(args: argparse.Namespace) -> None:
    from .hub import verify

    refuse_outputs(args)
    own = ("neurons", "time_steps", "batch_size", "limit", "workers", "device", "progress")
    results = verify(args.model, args.data, **{name: getattr(args, name) for name in own})
    lines = []
    for result in results:
        neurons = "coupled" if result["batch_coupled"] else "per sample"
        size = "x".join(map(str, result["input_size"][1:]))
        lines.append(
            f"{neurons:<10}  top-1 {result['top1']:6.2f} %  top-5 {result['top5']:6.2f} %  "
            f"{result['images']:,} images of {size}, T = {result['time_steps']}, "
            f"{result['images_per_second']:.1f} images/s on {result['device']}"
        )
    show(args, results, "\n".join(lines))


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

    refuse_outputs(args)
    results = validate(resolve_validate(vars(args)))
    rate = results["firing_rate"]
    summary = (
        f"top-1 {results['top1']:.3f} %  top-5 {results['top5']:.3f} %  loss {results['loss']:.5f}  "
        f"{results['samples']:,} samples, {results['images_per_second']:.1f} images/s"
        + (f", firing rate {rate:.4f}" if rate is not None else "")
    )
    show(args, results, summary)


def _add_validate(parser: argparse.ArgumentParser) -> None:
    add_validate_arguments(parser)
    add_json(parser, "the results")


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
    "validate": ("measure a model's accuracy on images or events", _add_validate, _validate),
    "verify": ("measure top-1 and top-5 accuracy on labelled images", _add_verify, _verify),
    "calibrate": ("find the threshold at which a model may stop early", streaming.add_calibrate, streaming.calibrate),
    "stream": ("classify a recording of events window by window", streaming.add_stream, streaming.stream),
    "profile": ("firing rates, energy, memory and speed of a model", analysis.add_profile, analysis.profile),
    "visualize": ("draw a model's attention", analysis.add_visualize, analysis.visualize),
    "export": ("write a model as a graph: ONNX, OpenVINO, torch", exporting.add_export, exporting.export),
    "app": ("look at pictures and recordings with a model, in the browser", app.add_app, app.app),
    "events": ("say what recordings of event cameras hold, and convert them", events.add_events, events.events),
    "search": ("search for architectures without training them", search.add_search, search.search),
    "reproduce": ("remake the paper's tables and figures", reproduction.add_reproduce, reproduction.reproduce),
    "doctor": ("say what this machine has, and which kernels run on it", doctor.add_doctor, doctor.doctor),
    "publish": ("upload a converted folder to the Hugging Face Hub", _add_publish, _publish),
}
ALIASES = {"reproduce": ["paper"]}  # what commands were called before


_EXTRAS = {
    "aedat": "events",
    "h5py": "events",
    "hdf5plugin": "events",
    "sklearn": "demo",
    "gradio": "app",
    "matplotlib": "analysis",
    "tensorboard": "train",
    **dict.fromkeys(("onnx", "onnxruntime", "openvino"), "export"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; errors that the user can act on are one line and exit status 2."""
    args = build_parser().parse_args(argv)
    try:
        _import(args.imports)
        args.run(args)
        sys.stdout.flush()
    except ModuleNotFoundError as error:
        extra = _EXTRAS.get((error.name or "").partition(".")[0])
        if extra is None:
            raise
        return _fail(f"{error.name} is missing: pip install 'timm-qkformer[{extra}]'")
    except BrokenPipeError:  # `timm-qkformer ... | head`: nobody reads on, and Python would complain at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (OSError, ValueError) as error:
        return _fail(str(error))
    except KeyboardInterrupt:
        print("timm-qkformer: interrupted", file=sys.stderr)
        return 130
    return 0


def build_parser() -> argparse.ArgumentParser:
    """The parser of the whole command line. `parse_args(argv).run(args)` runs the command."""
    parser = argparse.ArgumentParser(
        prog="timm-qkformer",
        description="Spiking transformers (QKFormer and its family) for timm: train, measure, look inside, deploy",
        epilog=f"timm-qkformer COMMAND --help has examples.\n{EXIT_STATUS}",
        formatter_class=HelpFormatter,
    )
    parser.add_argument("--version", action=_Version, help="versions of the package and of what it builds on")
    parser.add_argument(
        "--import",
        dest="imports",
        action="append",
        default=[],
        metavar="MODULE",
        help="module of this folder or an installed one to import first: yours, that registers an operator or a neuron",
    )
    parser.add_argument(
        "--print-completion",
        action=PrintCompletion,
        choices=("bash", "zsh", "tcsh"),
        help="print a script that completes commands and options in this shell",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (text, add_arguments, run) in COMMANDS.items():
        command = commands.add_parser(
            name,
            aliases=ALIASES.get(name, []),
            help=text,
            description=text[0].upper() + text[1:],
            epilog=examples(name),
            formatter_class=HelpFormatter,
        )
        add_arguments(command)
        command.set_defaults(run=run)
    return parser


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
