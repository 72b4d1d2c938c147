"""The page: Gradio's widgets around `look_at`. Nothing is loaded from or sent to anywhere else."""

import logging
from pathlib import Path
from typing import Any

import gradio as gr

from ..errors import first_line, printable
from .look import SHOWN_LAYERS, Models, look_at

_logger = logging.getLogger(__name__)
_INTRO = """## Spiking transformers, step by step
Give a photograph, or a recording of an event camera for a model of events. The models that come with the package know
CIFAR-10's ten classes and handwritten digits recorded by an event camera (N-MNIST), and nothing else: whatever they see
is one of these to them."""


def build_page(models: Models) -> Any:
    """The page, a `gradio.Blocks`; `launch` serves it."""

    def look(path: str | None, name: str, height: float | None, width: float | None) -> tuple[Any, ...]:
        if not path:
            raise gr.Error("Choose a picture or a recording first.", print_exception=False)
        size = (int(height), int(width)) if height and width else None
        try:
            seen = look_at(models[name], Path(path), size)
        except (OSError, ValueError) as error:
            message = printable(str(error).replace(str(Path(path).parent) + "/", ""))
            raise gr.Error(message, print_exception=False) from error
        except (RuntimeError, MemoryError) as error:
            _logger.exception("a file could not be shown")
            raise gr.Error(f"This file cannot be shown: {first_line(error)}", print_exception=False) from error
        masks = [*seen.attention, *[None] * (SHOWN_LAYERS - len(seen.attention))]
        return seen.sentence, seen.answer, seen.steps, seen.summary, *masks[:SHOWN_LAYERS], seen.raster

    with gr.Blocks(title="timm-qkformer", analytics_enabled=False) as page:
        gr.Markdown(_INTRO)
        with gr.Row():
            with gr.Column(scale=1):
                file = gr.File(label="picture or recording", type="filepath")
                model = gr.Dropdown(models.names, value=models.names[0], label="model")
                with gr.Accordion("event camera", open=False):
                    gr.Markdown("Height and width of the sensor in pixels, where the file does not state them.")
                    height, width = (
                        gr.Number(34, label="height", precision=0),
                        gr.Number(34, label="width", precision=0),
                    )
                button = gr.Button("look", variant="primary")
            with gr.Column(scale=2):
                said = gr.Markdown()
                label = gr.Label(num_top_classes=5, label="after the last time step")
                steps = gr.Plot(label="after each time step")
                summary = gr.Markdown()
        masks = [gr.Plot(label=f"what the attention keeps, layer {i + 1}") for i in range(SHOWN_LAYERS)]
        raster = gr.Plot(label="firing raster of the first keys")
        button.click(
            look, [file, model, height, width], [said, label, steps, summary, *masks, raster], api_name="look",
            concurrency_limit=2,
        )  # fmt: skip
    return page


def serve(models: Models, host: str = "127.0.0.1", port: int | None = None, wait: bool = True) -> str:
    """Serve the page and return its address; with `wait`, only when interrupted.

    OSError if the port is taken. Uploads are limited to 64 MB.
    """
    font = ["system-ui", "sans-serif"]  # Gradio's own come from elsewhere
    page = build_page(models)
    _, address, _ = page.launch(
        server_name=host,
        server_port=port,
        max_file_size="64mb",
        prevent_thread_lock=True,
        quiet=True,
        share=False,
        theme=gr.themes.Default(font=font, font_mono=["monospace"]),
    )
    print(f"serving at {address}; Ctrl-C ends it", flush=True)
    if wait:
        page.block_thread()
    return str(address)
