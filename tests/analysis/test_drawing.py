"""Pictures show what was recorded, the right way up."""

import re

import numpy as np
import pytest
import torch
from PIL import Image
from planted import GREEN, RED, SIZE, planted_image, planted_model

from doc_examples import DOCS, run_examples
from tiny import images, tiny

pytest.importorskip("matplotlib")

from timm_qkformer.analysis import drawing, record_attention
from timm_qkformer.analysis.drawing import (
    draw_attention,
    draw_channel_masks,
    draw_gallery,
    draw_query_key,
    draw_raster,
    draw_token_masks,
    save_picture,
)
from timm_qkformer.analysis.inputs import input_pictures
from timm_qkformer.neurons import LIF

PICTURES_DOC = DOCS / "pictures.md"


class Drawn:
    """A figure as the file that is written of it."""

    def __init__(self, figure, path):
        save_picture(figure, path)
        with Image.open(path) as picture:
            self.pixels = np.asarray(picture.convert("L"))

    def centres(self, axis, cells):
        """Brightness (0 to 255) at the centre of each of the cells (rows, columns) that an axis is divided into."""
        box = axis.get_window_extent()
        rows, columns = cells
        top = len(self.pixels) - box.y1  # pictures are stored from the top, figures measured from the bottom
        y = top + (np.arange(rows) + 0.5) / rows * box.height
        x = box.x0 + (np.arange(columns) + 0.5) / columns * box.width
        return self.pixels[np.ix_(y.astype(int), x.astype(int))]


def mask(places):
    result = np.zeros(SIZE, bool)
    for place in places:
        result[place] = True
    return result


@pytest.fixture(scope="module")
def record():
    return record_attention(planted_model(), planted_image())[0]


@pytest.fixture(scope="module")
def pictures():
    return input_pictures(planted_image())


def test_token_masks_are_drawn_where_they_are(record, pictures, tmp_path):
    figure = draw_token_masks(record, pictures, title="planted")
    axes = np.array(figure.axes[:-1]).reshape(4, 4)  # input, mean, two heads; mean, three time steps
    file = Drawn(figure, tmp_path / "masks.png")
    for column in range(4):
        assert np.array_equal(file.centres(axes[2, column], SIZE) > 200, mask(RED))
        assert np.array_equal(file.centres(axes[3, column], SIZE) > 200, mask(GREEN))
        assert np.array_equal(file.centres(axes[1, column], SIZE) > 100, mask(RED + GREEN))
    assert np.array_equal(file.centres(axes[0, 0], SIZE) > 30, mask(RED + GREEN))  # the input as it is
    untinted, tinted = (file.centres(axes[0, column], SIZE).astype(int) for column in (0, 1))
    assert np.array_equal(untinted != tinted, mask(RED + GREEN))


def test_query_key_as_matrices(record, tmp_path):
    figure = draw_query_key([record], tokens=96, head=0)
    q, a, k, attended = figure.axes
    file = Drawn(figure, tmp_path / "qk.png")
    flat = mask(RED).reshape(1, -1)
    assert np.array_equal(file.centres(q, (2, 96)) > 128, np.repeat(flat, 2, 0))
    assert np.array_equal(file.centres(a, (1, 96)) > 128, flat)
    assert (file.centres(k, (2, 96)) > 128).all()
    assert np.array_equal(file.centres(attended, (2, 96)) > 128, np.repeat(flat, 2, 0))


def test_query_key_shows_the_middle_of_many_tokens(record, tmp_path):
    figure = draw_query_key([record], tokens=20, head=1)
    segment = mask(RED + GREEN).reshape(-1)[38:58]
    assert not segment.any()
    assert "38 to 57 of 96" in figure.axes[3].get_xlabel()
    figure = draw_query_key([record], tokens=90, head=1)  # 3 to 92, and the green pixel is token 73
    found = Drawn(figure, tmp_path / "qk.png").centres(figure.axes[1], (1, 90))[0] > 128
    assert found.nonzero()[0].tolist() == [70]


def test_query_key_of_an_unsuitable_layer(record):
    ssa = record_attention(planted_model("ssa"), planted_image())[0]
    with pytest.raises(ValueError, match="has no mask"):
        draw_query_key([ssa])
    with pytest.raises(ValueError, match="step=3 must be from 0 to 2"):
        draw_query_key([record], step=3)
    with pytest.raises(ValueError, match="head=2 must be from 0 to 1"):
        draw_query_key([record], head=2)


def test_channel_masks(tmp_path):
    record = record_attention(planted_model("qkca"), planted_image(green=[]))[0]
    figure = draw_channel_masks(record)
    for axis in figure.axes[:4]:
        assert np.array_equal(
            Drawn(figure, tmp_path / "c.png").centres(axis, (2, 2)) > 128, [[True, True], [False, False]]
        )
    figure = draw_query_key([record], head=0, tokens=96)
    assert (Drawn(figure, tmp_path / "c.png").centres(figure.axes[1], (2, 96)) > 128).all()


def test_raster(tmp_path):
    spikes = np.zeros((5, 7), bool)
    spikes[1, 2] = spikes[4, 6] = True
    figure = draw_raster(spikes, np.arange(5) * 10, 41, "a.neuron")
    assert np.array_equal(Drawn(figure, tmp_path / "r.png").centres(figure.axes[0], (5, 7)) < 100, spikes)
    assert [bar.get_height() for bar in figure.axes[1].patches] == pytest.approx(spikes.mean(0))


def test_gallery_has_a_row_for_each_input(record, pictures, tmp_path):
    other = record_attention(planted_model(), planted_image(red=GREEN, green=GREEN))[0]
    figure = draw_gallery([pictures[0]] * 2, [[record], [other]])
    first, second = figure.axes[1], figure.axes[3]
    assert np.array_equal(Drawn(figure, tmp_path / "g.png").centres(first, SIZE) > 100, mask(RED + GREEN))
    assert np.array_equal(Drawn(figure, tmp_path / "g.png").centres(second, SIZE) > 200, mask(GREEN))


def test_every_kind_of_layer_and_long_clips_can_be_drawn(tmp_path):
    x = torch.rand(2, 20, 2, 32, 32, dtype=torch.float64)
    for record in record_attention(tiny("test_qkformer", in_chans=2), x):
        for figure in (draw_token_masks(record, input_pictures(x), 1), draw_channel_masks(record, 1)):
            assert "8 of 20 time steps" in figure.get_suptitle()
            save_picture(figure, tmp_path / "picture.png")


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("levels", ["ternary", "real"])
def test_other_than_binary_neurons(levels, tmp_path):
    neuron = type("Other", (LIF,), {"levels": levels})
    x = images(1)
    records = record_attention(tiny("test_qkformer", neuron=neuron), x)
    assert records[0].inputs["q"].dtype == np.float32
    for figure in draw_attention(records, input_pictures(x)).values():
        save_picture(figure, tmp_path / "picture.png")


def test_the_same_input_gives_the_same_bytes(tmp_path):
    record = record_attention(tiny("test_qkformer"), images(1))[0]
    files = [
        save_picture(draw_token_masks(record, input_pictures(images(1) * 0)), tmp_path / f"{i}.png") for i in (1, 2)
    ]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_nothing_of_pyplot_is_touched(record, pictures, tmp_path):
    import sys

    before = "matplotlib.pyplot" in sys.modules
    save_picture(draw_token_masks(record, pictures), tmp_path / "p.png")
    assert ("matplotlib.pyplot" in sys.modules) == before


def test_inputs_as_pictures():
    grey = input_pictures(torch.tensor([[[[0.0, 1.0]]]]), mean=(0.5,), std=(0.5,))
    assert grey.shape == (1, 1, 1, 2, 3)
    assert np.allclose(grey[0, 0, 0, :, 0], [0.5, 1.0])
    red = input_pictures(torch.tensor([1.0, 0.0, 0.0]).view(1, 3, 1, 1))
    assert np.allclose(red[0, 0, 0, 0], [1, 0, 0])
    clip = torch.zeros(1, 2, 2, 1, 3)
    clip[0, 0, 0, 0, 0] = 4.0  # "off" events in the first column, in the first frame
    clip[0, 1, 1, 0, 2] = 4.0  # "on" events in the last column, in the second
    frames = input_pictures(clip)[0, :, 0, :, 0]
    assert np.allclose(frames, [[0.0, 0.5, 0.5], [0.5, 0.5, 1.0]])
    assert np.allclose(input_pictures(torch.zeros(1, 2, 2, 4, 4)), 0.5)
    with pytest.raises(ValueError, match=r"mean=\(0\.5, 0\.5\) needs one entry for each of the input's 3 channels"):
        input_pictures(torch.zeros(1, 3, 4, 4), mean=(0.5, 0.5))


def test_examples_of_the_docs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run_examples(PICTURES_DOC) == 2
    out = capsys.readouterr().out
    assert "'stages.0.blocks.0.attn': 'qkta'" in out
    for shape in ("(4, 2, 4, 1, 16, 16)", "(4, 2, 4, 4, 16, 16)", "(2, 16, 16)", "(4, 2, 64, 16, 16)"):
        assert shape in out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["masks.png", "raster.png"]


def test_pictures_of_the_docs_are_there_and_small():
    pictures = re.findall(r"!\[.*?\]\((.*?)\)", PICTURES_DOC.read_text())
    assert len(pictures) >= 4
    for picture in pictures:
        assert 0 < (PICTURES_DOC.parent / picture).stat().st_size < 150_000


@pytest.mark.parametrize("name", ["a$b$c.png", "costs $5", r"$\nosuchcommand$.png", "x_{$}^{$"])
def test_dollar_signs_in_file_names_are_dollar_signs(name, tmp_path):
    figure = drawing._figure(3.0, 2.0)
    drawing._titled(figure, name, "a line with $X'$")
    figure.savefig(tmp_path / "a.png")
    rows, _ = drawing._rows(2, name)
    rows.savefig(tmp_path / "b.png")
    assert figure.get_suptitle().splitlines()[0] == name.replace("$", r"\$")
