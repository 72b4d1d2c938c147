"""`timm-qkformer export`."""

import argparse
from dataclasses import asdict
from pathlib import Path

from .model import add_model, add_model_options, add_sensor_size, load
from .output import add_json, refuse_outputs, show


def add_export(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    parser.add_argument("--format", choices=("onnx", "openvino", "torch"), default="onnx", help="default: %(default)s")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--clip", action="store_true", help="the whole image or clip at once (the default)")
    form.add_argument("--step", action="store_true", help="one time step, with the state as inputs and outputs")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="FILE.onnx, FILE.xml or FILE.pt2")
    parser.add_argument("--force", action="store_true", help="replace files that exist")
    parser.add_argument(
        "--data", type=Path, metavar="DIR", help="images or recordings to compare with the model on (default: noise)"
    )
    parser.add_argument("--limit", type=int, metavar="N", help="compare on N of them, drawn at random (default: 200)")
    add_json(parser, "the comparison and what stands in the file")
    add_sensor_size(parser)
    add_model_options(parser)


def export(args: argparse.Namespace) -> None:
    from ..analysis.inputs import file_data
    from ..exporting import export as write

    refuse_outputs(args)
    loaded = load(args)
    data = None
    if args.data is not None:
        sensor_size = tuple(args.sensor_size) if args.sensor_size else None
        data = file_data(loaded.model, args.data, args.limit or 200, sensor_size)[1]
    form = {"step": args.step, "force": args.force, "name": loaded.title}
    result = write(loaded.model, args.output, args.format, data=data, **form)
    show(args, asdict(result), str(result))
