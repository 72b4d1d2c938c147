"""From files to pictures of what a model's attention does with them: what `timm-qkformer visualize` runs."""

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from torch import nn

from ..files import refuse_existing
from ..operators import Operator
from ..progress import Bar
from .attention import record_attention, select_layers
from .drawing import QUERY_KEY, draw_attention, draw_gallery, draw_raster, save_picture
from .hooks import CALIBRATION_SAMPLES, bare_model, pick_neurons, recalibrated_norms, record_layer
from .inputs import FileInput, ModelInputs, find_files
from .names import has_mask, place_of

_GALLERY_ROWS = 12  # inputs on one gallery picture


def visualize(
    model: nn.Module,
    paths: Sequence[Path],
    output: Path,
    *,
    stage: int | None = None,
    block: int | None = None,
    raster: str | None = None,
    sensor_size: tuple[int, int] | None = None,
    untrained: bool = False,
    title: str = "",
    quiet: bool = False,
) -> list[Path]:
    """Draw the attention of a model for images and recordings of events.

    A file gets a picture for each attention layer (masks by head and time step), one of Q, mask, K and X' as in the
    paper's Fig. 3, and a firing raster. A folder gets galleries of all that is in it, twelve to a picture.

    Args:
        model: A model of this package; it runs in eval mode and is left as it was.
        paths: Images (anything that timm reads), recordings of events and folders of them.
        output: Folder for the pictures, made if missing.
        stage: Only this stage's layers, counted from 1 as in the paper. None: those with a mask or, in a model
            without any, every attention layer.
        block: Only this block of each stage, counted from 1.
        raster: Layer of neurons for the raster, such as "stages.0.blocks.0.mlp.fc1.neuron". None: the keys of the
            first layer drawn.
        sensor_size: (height, width) of the event camera, see `ModelInputs`.
        untrained: Run with batch norm statistics of the first inputs instead of the model's own; without it hardly
            anything fires in a model that was not trained, see `recalibrated_norms`.
        title: First line of every picture's title.
        quiet: Show no progress bar.

    Returns:
        The files written.

    Raises:
        FileExistsError: If one of them is there already; nothing is written then.
        ValueError: For a path, stage or block that is not there, or a file that the model cannot take.
    """
    plain: Any = bare_model(model)
    layers = select_layers(plain, stage, block)
    inputs = ModelInputs(plain, sensor_size)
    single = [path for path in paths if not path.is_dir()]
    files = [file for path in single for file in find_files(path)]
    galleries = {folder: find_files(folder) for folder in paths if folder.is_dir()}
    names = _names(files)
    targets = {name: _targets(output, name, layers) for name in names}
    pages = {
        output / f"{folder.resolve().name}-gallery-{i + 1}.png": found[start : start + _GALLERY_ROWS]
        for folder, found in galleries.items()
        for i, start in enumerate(range(0, len(found), _GALLERY_ROWS))
    }
    written = [path for group in targets.values() for path in group.values()] + list(pages)
    if not written:
        raise ValueError("paths is empty: give an image, a recording of events or a folder of them")
    if len(set(written)) < len(written):
        raise ValueError("two of the folders have the same name, and so would their galleries: draw them one by one")
    refuse_existing(*written)
    output.mkdir(parents=True, exist_ok=True)
    everything = [*files, *(file for found in pages.values() for file in found)]
    samples = [inputs.read(file).x for file in everything[:CALIBRATION_SAMPLES]] if untrained else []
    with (
        recalibrated_norms(plain, samples) if untrained else nullcontext(),
        Bar(total=len(everything), desc="drawing", unit="input", disable=quiet or None) as bar,
    ):
        for name, file in zip(names, files, strict=True):
            heading = f"{title}: {file.name}" if title else file.name
            _draw_file(plain, inputs.read(file), layers, raster, targets[name], heading)
            bar.update()
        for target, found in pages.items():
            shown = [inputs.read(file) for file in found]
            records = []
            for item in shown:
                records.append(record_attention(plain, item.x, list(layers)))
                bar.update()
            save_picture(draw_gallery([item.pictures[0] for item in shown], records, title), target)
    return [path for path in written if path.exists()]  # a mask of an unknown kind is on no picture


def _names(files: Sequence[Path]) -> list[str]:
    """A name for each file's pictures: its own, numbered if several have the same."""
    stems = [file.stem for file in files]
    repeated = len(set(stems)) < len(stems)
    return [f"{i + 1:03}-{stem}" if repeated else stem for i, stem in enumerate(stems)]


def _targets(output: Path, name: str, layers: dict[str, Operator]) -> dict[str, Path]:
    """File of each picture of one input, by layer name, "query-key" or "raster"."""
    targets = {}
    for path, layer in layers.items():
        place = (place_of(path)[0] or path).replace(" ", "").replace(",", "-")
        targets[path] = output / f"{name}-{place}-{layer.main_view}.png"
    if any(map(has_mask, layers.values())):
        targets[QUERY_KEY] = output / f"{name}-{QUERY_KEY}.png"
    targets["raster"] = output / f"{name}-raster.png"
    return targets


def _draw_file(
    model: nn.Module,
    item: FileInput,
    layers: dict[str, Operator],
    raster: str | None,
    targets: dict[str, Path],
    title: str,
) -> None:
    records = record_attention(model, item.x, list(layers))
    for name, figure in draw_attention(records, item.pictures, title).items():
        save_picture(figure, targets[name])
    keys = layers[records[0].name].inputs[:2][-1]  # the second input, if there are two
    layer = raster or f"{records[0].name}.{keys}.neuron"
    save_picture(draw_raster(*pick_neurons(record_layer(model, item.x, layer)), layer, title), targets["raster"])
