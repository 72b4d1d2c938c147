"""`timm-qkformer reproduce`."""

import argparse
import shlex
from pathlib import Path

from .model import add_model_options, add_sensor_size, load

# Of Table 7 and Fig. 3, where no trained model ships.
_UNTRAINED = "qkformer_hst3_192"


def add_reproduce(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", type=Path, default=Path("output/paper"), help="folder to write (%(default)s)")
    parser.add_argument("--model", metavar="MODEL", help="model of Table 7 and Fig. 3 (default: one that ships)")
    parser.add_argument("--data", type=Path, metavar="PATH", help="images or recordings for it (default: photographs)")
    parser.add_argument("--limit", type=int, default=64, metavar="N", help="at most N of them (%(default)s)")
    parser.add_argument("--quick", action="store_true", help="shortened measurements, to try it out")
    compare = "instead: train attentions in one skeleton and families at one size on --data and write comparison.md"
    parser.add_argument("--compare", choices=("cifar10", "nmnist"), help=compare)
    parser.add_argument("--groups", nargs="+", default=["attention", "family"], help="of --compare (%(default)s)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of --compare (%(default)s)")
    parser.add_argument("--epochs", type=int, metavar="N", help="of --compare (the recipe's)")
    parser.add_argument("--jobs", type=int, default=1, help="of --compare: trainings at once (%(default)s)")
    add_sensor_size(parser)
    add_model_options(parser)


def _model_for(data: Path | None) -> str:
    """A model that ships and takes what `data` holds; photographs where there is none."""
    import timm

    from ..analysis.inputs import find_files
    from ..data import EVENT_SUFFIXES
    from ..hub.loading import shipped_models

    events = data is not None and find_files(data)[0].suffix.lower() in EVENT_SUFFIXES
    suited = (name for name in shipped_models() if (timm.get_pretrained_cfg(name).input_size[0] == 2) == events)
    return next(suited, _UNTRAINED)


def _compare(args: argparse.Namespace) -> None:
    from ..files import write_atomically
    from ..reproduction.comparison import comparison_section, run_comparison

    if args.data is None:
        raise ValueError("--compare trains models: --data says where their data are")
    options = [] if args.epochs is None else ["--epochs", str(args.epochs)]
    rows = run_comparison(args.compare, args.data, args.output, args.groups, args.seeds, options, jobs=args.jobs)
    page = args.output / "comparison.md"
    write_atomically(page, "\n".join(comparison_section(rows)) + "\n")
    print(f"wrote {page}")


def reproduce(args: argparse.Namespace) -> None:
    if args.compare:
        _compare(args)
        return
    import matplotlib  # noqa: F401, missing: say so before anything is measured
    import torch

    from ..analysis.inputs import ModelInputs, file_data
    from ..reproduction import Subject, photographs, write_page

    loaded = load(args, args.model or _model_for(args.data))
    sensor_size = tuple(args.sensor_size) if args.sensor_size else None
    inputs = ModelInputs(loaded.model, sensor_size)
    if args.data is None:
        x = photographs(inputs)
        data = f"{len(x)} tiles of the photographs in scikit-learn"
    else:
        data, samples = file_data(loaded.model, args.data, args.limit, sensor_size)
        x = torch.cat(list(samples))
    normalisation = (inputs.mean, inputs.std) if loaded.model.in_chans != 2 else ()
    subject = Subject(loaded.model, loaded.title, loaded.is_random, x, data, *normalisation)
    written = write_page(args.output, subject, _command(args), quick=args.quick)
    print("\n".join(f"wrote {path}" for path in written))


def _command(args: argparse.Namespace) -> str:
    """What was typed for `reproduce`, but for options of no consequence and the folders that files are in."""
    words = ["timm-qkformer", "reproduce"]
    defaults = {"model": None, "checkpoint": None, "data": None, "limit": 64, "seed": 0, "time_steps": None}
    for option, default in defaults.items():
        value = getattr(args, option)
        if value != default:
            words += [f"--{option.replace('_', '-')}", value.name if isinstance(value, Path) else str(value)]
    if args.sensor_size is not None:
        words += ["--sensor-size", *map(str, args.sensor_size)]
    if args.model_kwargs:
        words += ["--model-kwargs", *args.model_kwargs]
    words += [f"--{option}" for option in ("random", "quick") if getattr(args, option)]
    return shlex.join(words)
