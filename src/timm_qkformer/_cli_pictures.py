"""`timm-qkformer visualize` and `timm-qkformer paper`: their arguments, and what they print."""

import argparse
from pathlib import Path

from ._cli_model import add_model_options, load

__all__ = ["add_visualize", "visualize"]


def add_visualize(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model", metavar="MODEL", help="registered name, converted folder, local-dir:FOLDER, hf-hub:REPO or checkpoint"
    )
    parser.add_argument(
        "paths",
        type=Path,
        nargs="+",
        metavar="IMAGE",
        help="images, recordings of events (.npz, .aedat4, .bs2), folders",
    )
    parser.add_argument("--output", type=Path, default=Path("output/pictures"), help="folder to write (%(default)s)")
    parser.add_argument("--stage", type=int, metavar="N", help="only this stage's attention, counted from 1")
    parser.add_argument("--block", type=int, metavar="N", help="only this block of each stage, counted from 1")
    parser.add_argument("--raster", metavar="LAYER", help="neurons of the firing raster, such as stem.neuron")
    parser.add_argument(
        "--sensor-size", type=int, nargs=2, metavar=("HEIGHT", "WIDTH"), help="of the event camera (.aedat4 states it)"
    )
    add_model_options(parser)


def visualize(args: argparse.Namespace) -> None:
    import matplotlib  # noqa: F401, missing: say so before anything is loaded

    from .analysis.visualize import visualize as draw

    loaded = load(args, args.model)
    if loaded.is_random:
        print(
            f"{loaded.name} has {loaded.weights}: what it attends to means nothing. Its batch norms take their "
            "statistics from the inputs, since hardly a neuron would fire otherwise"
        )
    written = draw(
        loaded.model,
        args.paths,
        args.output,
        stage=args.stage,
        block=args.block,
        raster=args.raster,
        sensor_size=tuple(args.sensor_size) if args.sensor_size else None,
        untrained=loaded.is_random,
        title=loaded.title,
    )
    print("\n".join(f"wrote {path}" for path in written))
