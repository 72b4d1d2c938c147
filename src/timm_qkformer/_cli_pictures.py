"""`timm-qkformer visualize` and `timm-qkformer paper`: their arguments, and what they print."""

import argparse
import shlex
from pathlib import Path
from typing import Optional

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
        help="images, recordings of events (.npz, .aedat4, .bin, .bs2), folders",
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


# Of Table 7 and Fig. 3, where no trained model ships.
_UNTRAINED = "qkformer_hst3_192"


def add_paper(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", type=Path, default=Path("output/paper"), help="folder to write (%(default)s)")
    parser.add_argument("--model", metavar="MODEL", help="model of Table 7 and Fig. 3 (default: one that ships)")
    parser.add_argument("--data", type=Path, metavar="PATH", help="images or recordings for it (default: photographs)")
    parser.add_argument("--limit", type=int, default=64, metavar="N", help="at most N of them (%(default)s)")
    parser.add_argument("--quick", action="store_true", help="shortened measurements, to try it out")
    parser.add_argument(
        "--sensor-size", type=int, nargs=2, metavar=("HEIGHT", "WIDTH"), help="of the event camera (.aedat4 states it)"
    )
    add_model_options(parser)


def _model_for(data: Optional[Path]) -> str:
    """A model that ships and takes what `data` holds; photographs where there is none."""
    import timm

    from .analysis.inputs import find_files
    from .data import EVENT_SUFFIXES
    from .hub.loading import shipped_models

    events = data is not None and find_files(data)[0].suffix.lower() in EVENT_SUFFIXES
    suited = (name for name in shipped_models() if (timm.get_pretrained_cfg(name).input_size[0] == 2) == events)
    return next(suited, _UNTRAINED)


def paper(args: argparse.Namespace) -> None:
    import matplotlib  # noqa: F401, missing: say so before anything is measured
    import torch

    from .analysis.inputs import ModelInputs
    from .analysis.paper import Subject, photographs, write_page
    from .analysis.profile import file_data

    loaded = load(args, args.model or _model_for(args.data))
    sensor_size = tuple(args.sensor_size) if args.sensor_size else None
    inputs = ModelInputs(loaded.model, sensor_size)
    if args.data is None:
        x = photographs(inputs)
        data = f"{len(x)} tiles of the photographs in scikit-learn"
    else:
        data, samples = file_data(loaded.model, args.data, args.limit, sensor_size)
        x = torch.cat(list(samples))
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
    written = write_page(args.output, subject, _command(args), quick=args.quick)
    print("\n".join(f"wrote {path}" for path in written))


def _command(args: argparse.Namespace) -> str:
    """What was typed for `paper`, but for options of no consequence and the folders that files are in."""
    words = ["timm-qkformer", "paper"]
    for option, default in (("model", None), ("checkpoint", None), ("data", None), ("limit", 64), ("seed", 0)):
        value = getattr(args, option)
        if value != default:
            words += [f"--{option}", value.name if isinstance(value, Path) else str(value)]
    if args.sensor_size is not None:
        words += ["--sensor-size", *map(str, args.sensor_size)]
    if args.model_kwargs:
        words += ["--model-kwargs", *args.model_kwargs]
    if args.time_steps is not None:
        words += ["--time-steps", str(args.time_steps)]
    words += [f"--{option}" for option in ("random", "quick") if getattr(args, option)]
    return shlex.join(words)
