"""`timm-qkformer app`."""

import argparse

from .model import add_device


def add_app(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "models",
        nargs="*",
        metavar="MODEL",
        help="names with a tag, converted folders or checkpoints to choose from (those that come with the package)",
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at; 0.0.0.0: all (%(default)s)")
    parser.add_argument("--port", type=int, metavar="N", help="port to listen at (the first free one from 7860 on)")
    add_device(parser)


def app(args: argparse.Namespace) -> None:
    import gradio  # noqa: F401, missing: say so before anything is loaded
    import matplotlib  # noqa: F401

    from ..app.look import Models
    from ..app.page import serve
    from ..devices import usable_device

    models = Models(args.models, usable_device(args.device))
    for name in args.models:
        models[name]  # a wrong name ends the command, not a user's look
    serve(models, args.host, args.port)
