"""`timm-qkformer events`: what recordings hold, and recordings in another format."""

import argparse
from collections import Counter
from pathlib import Path
from typing import Any

from .output import add_json, add_no_progress, byte_bar, refuse_outputs, show


def add_events(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE", help="recordings of any format")
    add_json(parser, "every number")
    parser.add_argument(
        "--pictures", type=Path, metavar="DIR", help="draw rates, pixels and polarities to DIR/FILE.png"
    )
    parser.add_argument("--gif", action="store_true", help="and a short film to DIR/FILE.gif; needs --pictures")
    parser.add_argument("--to", type=Path, metavar="OUT", help="convert one recording to .npz, .npy, .csv, .dat or .h5")
    parser.add_argument("--force", action="store_true", help="replace files that are there")
    add_no_progress(parser)


def events(args: argparse.Namespace) -> None:
    from ..data.convert import convert_events
    from ..data.summary import summarize, text_summary
    from ..errors import printable

    if args.gif and args.pictures is None:
        raise ValueError("--gif needs --pictures DIR, the folder to write it to")
    if args.to is not None and (len(args.files) > 1 or args.json or args.pictures):
        raise ValueError(f"--to {args.to} takes one recording, and neither --json nor --pictures")
    outputs = _outputs(args)
    if not args.force:
        refuse_outputs(args, *outputs.values())
    if args.pictures is not None:
        import matplotlib  # noqa: F401, missing: say so before anything is read
    if args.to is not None:
        with byte_bar(args, f"converting {args.files[0].name}") as progress:
            count = convert_events(args.files[0], args.to, overwrite=args.force, progress=progress)
        print(f"wrote {args.to}: {count:,} events")
        return
    summaries, lines = [], []
    for path in args.files:
        with byte_bar(args, f"reading {path.name}") as progress:
            summary = summarize(path, progress)
        summaries.append(summary.to_dict())
        lines.append(printable(text_summary(summary), keep="\n"))
        if args.pictures is not None:
            lines += _draw(path, summary, outputs[path, "png"], outputs.get((path, "gif")))
    show(args, summaries, "\n".join(lines))


def _outputs(args: argparse.Namespace) -> dict[tuple[Path, str], Path]:
    """Pictures of each file."""
    if args.pictures is None:
        return {}
    kinds = ("png", "gif") if args.gif else ("png",)
    outputs = {(path, kind): args.pictures / f"{path.name}.{kind}" for path in args.files for kind in kinds}
    twice = [name for name, count in Counter(path.name for path in args.files).items() if count > 1]
    if twice:
        raise ValueError(f"--pictures {args.pictures}: several recordings are called {', '.join(twice)}")
    return outputs


def _draw(path: Path, summary: Any, picture: Path, film: Path | None) -> list[str]:
    """Lines that say what was written."""
    from ..analysis.drawing import save_picture
    from ..analysis.recordings import draw_recording, write_film

    picture.parent.mkdir(parents=True, exist_ok=True)
    save_picture(draw_recording(summary), picture)
    if film is not None:
        write_film(path, summary, film)
    return [f"wrote {written}" for written in (picture, film) if written is not None]
