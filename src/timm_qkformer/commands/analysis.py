"""`timm-qkformer profile` and `timm-qkformer visualize`."""

import argparse
from contextlib import nullcontext
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .model import add_device, add_model, add_model_options, add_sensor_size, load
from .output import STDOUT, add_json, refuse_outputs, show

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from ..analysis.profile import Profile

_NOISE = 4  # samples, where there are no data
_LAYERS = 10  # shown without --all


def add_profile(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    parser.add_argument(
        "--data", type=Path, metavar="DIR", help="images or recordings of events (default: random noise, said so)"
    )
    parser.add_argument(
        "--limit", type=int, metavar="N", help=f"take N samples, drawn at random (default: all; {_NOISE} of noise)"
    )
    add_sensor_size(parser)
    parser.add_argument("--batch-size", type=int, default=1, help="for speed and memory (%(default)s)")
    add_device(parser)
    parser.add_argument("--all", action="store_true", help="show every layer, not the ten largest alone")
    add_json(parser, "every number")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a report with pictures, to a new file")
    add_model_options(parser)


def profile(args: argparse.Namespace) -> None:
    from ..analysis.hooks import CALIBRATION_SAMPLES, recalibrated_norms
    from ..analysis.inputs import file_data, noise_data
    from ..analysis.profile import html_report, text_report
    from ..analysis.profile import profile as measure
    from ..devices import usable_device
    from ..files import write_atomically
    from ..progress import Bar

    if args.html is not None:
        import matplotlib  # noqa: F401, missing: say so before anything is measured

        args.html.parent.mkdir(parents=True, exist_ok=True)
    refuse_outputs(args, args.html)
    device = usable_device(args.device)
    loaded = load(args)
    model = loaded.model.to(device)

    def data() -> Any:
        if args.data is None:
            return noise_data(model, _NOISE if args.limit is None else args.limit)
        return file_data(model, args.data, args.limit, tuple(args.sensor_size) if args.sensor_size else None)

    data_name, samples = data()
    with recalibrated_norms(model, list(islice(data()[1], CALIBRATION_SAMPLES))) if loaded.is_random else nullcontext():
        result = measure(
            model,
            Bar(samples, desc="measuring", unit="sample", leave=False, disable=None),
            name=loaded.name,
            weights=f"{loaded.weights}, batch norms recalibrated on the data" if loaded.is_random else loaded.weights,
            is_random=loaded.is_random,
            data_name=data_name,
            batch_size=args.batch_size,
        )
        show(args, result.to_dict(), text_report(result, layers=None if args.all else _LAYERS))
        if args.html is not None:
            write_atomically(args.html, html_report(result, _figures(model, result, next(data()[1]))))
            if args.json != STDOUT:
                print(f"wrote {args.html}")


def _figures(model: Any, result: "Profile", x: Any) -> dict[str, "Figure"]:
    """Charts, and what the first layers with attention do with one sample."""
    from timm.data.config import resolve_model_data_config

    from ..analysis.attention import attention_layers, record_attention, select_layers
    from ..analysis.drawing import QUERY_KEY, draw_attention, draw_energy, draw_rates
    from ..analysis.inputs import input_pictures

    figures = {
        "Firing rates by layer": draw_rates(result.rates),
        "Energy by part of the model": draw_energy(result.energy),
    }
    if not attention_layers(model):
        return figures
    config = resolve_model_data_config(model)
    records = record_attention(model, x, list(select_layers(model)))
    drawn = draw_attention(records, input_pictures(x, config["mean"], config["std"]))
    query_key = drawn.pop(QUERY_KEY, None)
    figures |= {f"Attention of {name}, first sample": figure for name, figure in drawn.items()}
    if query_key is not None:
        figures["Queries, mask, keys and what is left of them, first sample"] = query_key
    return figures


def add_visualize(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    parser.add_argument(
        "paths",
        type=Path,
        nargs="+",
        metavar="IMAGE",
        help="images, recordings of events (.raw, .aedat4, .npz, ...), folders",
    )
    parser.add_argument("--output", type=Path, default=Path("output/pictures"), help="folder to write (%(default)s)")
    parser.add_argument("--stage", type=int, metavar="N", help="only this stage's attention, counted from 1")
    parser.add_argument("--block", type=int, metavar="N", help="only this block of each stage, counted from 1")
    parser.add_argument("--raster", metavar="LAYER", help="neurons of the firing raster, such as stem.neuron")
    add_sensor_size(parser)
    add_json(parser, "the files' names")
    add_model_options(parser)


def visualize(args: argparse.Namespace) -> None:
    import matplotlib  # noqa: F401, missing: say so before anything is loaded

    from ..analysis.visualize import visualize as draw

    refuse_outputs(args)
    loaded = load(args)
    if loaded.is_random and args.json != STDOUT:
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
    files = {"written": [str(path) for path in written], "random_weights": loaded.is_random}
    show(args, files, "\n".join(f"wrote {path}" for path in written))
