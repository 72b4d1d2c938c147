"""`timm-qkformer calibrate` and `timm-qkformer stream`."""

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..training.trainer.config import add_measured_arguments
from .model import add_model, add_model_options, add_sensor_size, load
from .output import STDOUT, add_json, add_no_progress, byte_bar, refuse_outputs, show

if TYPE_CHECKING:
    from ..data import Recording
    from ..streaming import Window


def add_calibrate(parser: argparse.ArgumentParser) -> None:
    add_measured_arguments(parser)
    group = parser.add_argument_group("calibration")
    split = "split to choose the threshold on (default: half of --split, measured on the other half)"
    group.add_argument("--calibration-split", metavar="NAME", help=split)
    measure = "what to stop on: confidence, margin or entropy (%(default)s)"
    group.add_argument("--exit", choices=("confidence", "margin", "entropy"), default="confidence", help=measure)
    points = "how far top-1 may be below that of T, in percentage points (%(default)s)"
    group.add_argument("--points", type=float, default=0.2, metavar="X", help=points)
    group.add_argument("--limit", type=int, metavar="N", help="take N samples of each split, drawn at random")
    precision = "deploy the model so first (default: run it as it is)"
    group.add_argument("--precision", choices=("fp32", "bf16", "int8"), help=precision)
    group.add_argument("--no-write", action="store_true", help="leave the model's folder as it is")
    add_json(parser, "every number")
    group.add_argument("--output", type=Path, metavar="FILE", help="draw accuracy against mean T, to a new PNG file")


def calibrate(args: argparse.Namespace) -> None:
    from ..training.trainer.calibrate import CalibrationSettings, run_calibration
    from ..training.trainer.evaluate import resolve_validate

    refuse_outputs(args, args.output)
    if args.output is not None:
        import matplotlib  # noqa: F401, missing: say so before anything is measured
    own = ("calibration_split", "exit", "points", "limit", "precision")
    settings = resolve_validate({name: value for name, value in vars(args).items() if name not in ("json", "output")})
    found, written = run_calibration(
        settings, CalibrationSettings(**{name: getattr(args, name) for name in own}, write=not args.no_write)
    )
    rule = found.rule
    last = f"no folder to write to: timm_qkformer.anytime(model, {rule.exit!r}, {rule.threshold:.6g})"
    if written is not None:
        last = f"wrote {written}: timm_qkformer.anytime(model) takes the threshold from there"
    facts = {"model": settings.model, "precision": args.precision or "plain"}
    show(args, {**facts, **found.to_dict()}, f"{found.text()}\n{last}")
    if args.output is not None:
        from ..streaming.drawing import draw_calibration

        _save(args, draw_calibration(found, settings.model))


def add_stream(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    parser.add_argument("recording", type=Path, metavar="RECORDING", help="file of events, of any supported format")
    cut = parser.add_mutually_exclusive_group(required=True)
    cut.add_argument(
        "--window", type=_microseconds, metavar="TIME", help="cut it into windows of 10ms, 500us, 0.1s, ..."
    )
    cut.add_argument("--count", type=int, metavar="N", help="cut it into windows of N events each")
    again = "begin from rest after so many windows (default: never)"
    parser.add_argument("--restart", type=int, metavar="N", help=again)
    precision = "deploy the model so; plain: run it as it is (%(default)s)"
    parser.add_argument("--precision", choices=("fp32", "bf16", "int8", "plain"), default="fp32", help=precision)
    add_sensor_size(parser)
    add_json(parser, "every window and number")
    parser.add_argument("--output", type=Path, metavar="FILE", help="draw the prediction over time, to a new PNG file")
    add_no_progress(parser)
    add_model_options(parser)


def _microseconds(text: str) -> int:
    """A duration such as 10ms."""
    for unit, factor in (("us", 1), ("ms", 1000), ("s", 1_000_000)):
        number = text.removesuffix(unit)
        if number != text:
            try:
                value = float(number) * factor
            except ValueError:
                break
            if 1 <= value < 2**62 and value == round(value):
                return round(value)
            break
    raise argparse.ArgumentTypeError(f"{text!r} must be a time of at least 1us, such as 10ms, 500us or 0.1s")


def stream(args: argparse.Namespace) -> None:
    from ..data import open_events
    from ..inference import deploy
    from ..streaming import StreamReport
    from ..streaming import stream as run

    refuse_outputs(args, args.output)
    if args.output is not None:
        import matplotlib  # noqa: F401, missing: say so before anything is measured
    loaded = load(args)
    model = loaded.model if args.precision == "plain" else deploy(loaded.model, args.precision)
    names = (getattr(model, "pretrained_cfg", None) or {}).get("label_names") or ()
    with open_events(args.recording) as recording, byte_bar(args, f"streaming {args.recording.name}") as progress:
        windows = _windows(args, model, recording, progress)
        report = StreamReport.of(run(model, windows, restart=args.restart, states=False), names)
    facts = {"model": loaded.name, "precision": args.precision, "recording": args.recording.name}
    title = f"{loaded.title}, {args.precision}: {args.recording.name}"
    show(args, {**facts, **report.to_dict()}, f"{title}\n{report.text()}")
    if args.output is not None:
        from ..streaming.drawing import draw_stream

        _save(args, draw_stream(report, title))


def _windows(
    args: argparse.Namespace, model: Any, recording: "Recording", progress: Callable[[int, int], None]
) -> "Iterator[Window]":
    """Windows of the recording in frames of the model's size, or of the sensor's where that is smaller."""
    from timm.data import resolve_model_data_config

    from ..streaming import cut_windows

    sensor_size = tuple(args.sensor_size) if args.sensor_size else recording.sensor_size
    if sensor_size is None:
        raise ValueError(f"{args.recording} does not state the camera's size: give --sensor-size HEIGHT WIDTH")
    _, height, width = resolve_model_data_config(model)["input_size"]
    size = (min(height, sensor_size[0]), min(width, sensor_size[1]))
    for window in cut_windows(recording, duration=args.window, count=args.count, sensor_size=sensor_size, size=size):
        progress(recording.progress, recording.size)
        yield window


def _save(args: argparse.Namespace, figure: Any) -> None:
    from ..analysis.drawing import save_picture

    written = save_picture(figure, args.output)
    if args.json != STDOUT:
        print(f"wrote {written}")
