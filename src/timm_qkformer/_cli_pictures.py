"""`timm-qkformer visualize` and `timm-qkformer paper`: their arguments, and what they print."""

import argparse
from pathlib import Path

from ._cli_model import add_model_options, load

__all__ = ["add_paper", "add_visualize", "paper", "visualize"]


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


# Where no trained model ships: small enough for a minute on one core, and like the paper's models in all but width.
_UNTRAINED = "qkformer_hst10_384"
_UNTRAINED_ARGS = {
    "embed_dims": (48, 96, 192),
    "depths": (1, 2, 2),
    "pretrained_cfg_overlay": {"input_size": (3, 96, 96), "pool_size": (6, 6)},
}


def add_paper(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", type=Path, default=Path("output/paper"), help="folder to write (%(default)s)")
    parser.add_argument("--model", metavar="MODEL", help="model of Table 7 and Fig. 3 (default: one that ships)")
    parser.add_argument("--data", type=Path, metavar="PATH", help="images or recordings for it (default: photographs)")
    parser.add_argument("--limit", type=int, default=64, metavar="N", help="at most N of them (%(default)s)")
    parser.add_argument("--quick", action="store_true", help="shortened measurements, to try it out")
    parser.add_argument(
        "--sensor-size", type=int, nargs=2, metavar=("HEIGHT", "WIDTH"), help="of the event camera (.aedat4 states it)"
    )
    _add_model_options(parser)


def paper(args: argparse.Namespace) -> None:
    import matplotlib  # noqa: F401, missing: say so before anything is measured
    import torch

    from .analysis.inputs import ModelInputs, find_files
    from .analysis.paper import Subject, photographs, write_page
    from .hub.loading import shipped_models

    if args.limit < 1:
        raise ValueError(f"--limit {args.limit} must be at least 1")
    source = args.model or next(iter(shipped_models()), None)
    if source is None:
        args.random = True
        args.model_kwargs = [*(f"{key}={value}" for key, value in _UNTRAINED_ARGS.items()), *args.model_kwargs]
        source = _UNTRAINED
    loaded = _load(args, source)
    inputs = ModelInputs(loaded.model, tuple(args.sensor_size) if args.sensor_size else None)
    if args.data is None:
        x = photographs(inputs)
        data = f"{len(x)} tiles of the photographs in scikit-learn"
    else:
        found = find_files(args.data)
        files = found[:: -(-len(found) // args.limit)]
        x = torch.cat([inputs.read(file).x for file in files])
        data = f"{len(x)} of {len(found)} inputs in {args.data.name}"
    normalised = loaded.model.in_chans != 2
    subject = Subject(
        loaded.model,
        loaded.title,
        loaded.is_random,
        x,
        data,
        inputs.mean if normalised else (),
        inputs.std if normalised else (),
    )
    command = "timm-qkformer paper" + (f" --model {args.model}" if args.model else "")
    command += (f" --data {args.data.name}" if args.data else "") + (" --quick" if args.quick else "")
    written = write_page(args.output, subject, command, quick=args.quick)
    print("\n".join(f"wrote {path}" for path in written))
