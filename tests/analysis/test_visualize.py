"""From files to pictures, and what is refused on the way."""

import numpy as np
import pytest
import timm
import torch
from PIL import Image

pytest.importorskip("matplotlib")

from planted import SIZE, planted_image, planted_model

from event_files import random_events, write_aedat4, write_npz
from timm_qkformer.analysis.inputs import ModelInputs, find_files
from timm_qkformer.analysis.visualize import visualize


@pytest.fixture(scope="module")
def model():
    return timm.create_model("test_qkformer").eval()


@pytest.fixture
def photo(tmp_path):
    path = tmp_path / "in" / "cat.jpg"
    path.parent.mkdir()
    noise = np.random.default_rng(0).integers(0, 255, (80, 100, 3), np.uint8)
    Image.fromarray(noise).save(path)
    return path


def names(paths):
    return [path.name for path in paths]


def test_a_file_gets_its_pictures(model, photo, tmp_path):
    state = {name: value.clone() for name, value in model.state_dict().items()}
    written = visualize(model, [photo], tmp_path / "new" / "out", untrained=True, quiet=True)
    assert names(written) == [
        "cat-stage1-block1-tokens.png",
        "cat-stage2-block1-channels.png",
        "cat-query-key.png",
        "cat-raster.png",
    ]
    assert sorted(names((tmp_path / "new" / "out").iterdir())) == sorted(names(written))
    for path in written:
        with Image.open(path) as picture:
            assert picture.format == "PNG"
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_a_folder_gets_galleries_of_twelve(model, photo, tmp_path):
    for i in range(12):
        (photo.parent / "deep" / str(i)).mkdir(parents=True)
        photo.with_name("deep").joinpath(str(i), "dog.png").symlink_to(photo)
    written = visualize(model, [photo.parent], tmp_path / "out", stage=1, quiet=True)
    assert names(written) == ["in-gallery-1.png", "in-gallery-2.png"]


def test_files_of_one_name_are_told_apart(model, photo, tmp_path):
    other = tmp_path / "other" / "cat.jpg"
    other.parent.mkdir()
    other.symlink_to(photo)
    written = visualize(model, [photo, other], tmp_path / "out", stage=3, block=2, raster="stem.neuron", quiet=True)
    assert names(written) == [
        "001-cat-stage3-block2-tokens.png",
        "001-cat-raster.png",
        "002-cat-stage3-block2-tokens.png",
        "002-cat-raster.png",
    ]


def test_nothing_is_overwritten(model, photo, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "cat-raster.png").write_text("mine")
    with pytest.raises(FileExistsError, match=r"cat-raster\.png exists already"):
        visualize(model, [photo], tmp_path / "out", quiet=True)
    assert names((tmp_path / "out").iterdir()) == ["cat-raster.png"]
    assert (tmp_path / "out" / "cat-raster.png").read_text() == "mine"


def test_recordings_of_events(tmp_path):
    model = timm.create_model("test_qkformer", in_chans=2, time_steps=6, pretrained_cfg_overlay=EVENTS).eval()
    stated = write_aedat4(tmp_path / "stated.aedat4", random_events(2000, (40, 80)))
    unstated = write_npz(tmp_path / "unstated.npz", random_events(2000))
    inputs = ModelInputs(model, (34, 34))
    assert inputs.read(stated).x.shape == (1, 6, 2, 40, 64)  # sampled down where it is larger than the model's 64
    read = inputs.read(unstated)
    assert read.x.shape == (1, 6, 2, 34, 34)
    assert read.x.sum() == 2000
    assert read.pictures.shape == (1, 6, 34, 34, 3)
    written = visualize(model, [unstated], tmp_path / "out", stage=1, sensor_size=(34, 34), untrained=True, quiet=True)
    assert len(written) == 3
    with pytest.raises(ValueError, match="does not state the camera's size"):
        visualize(model, [unstated], tmp_path / "other", quiet=True)


EVENTS = {"input_size": (2, 64, 64), "mean": (0.0, 0.0), "std": (1.0, 1.0)}


def test_images_and_events_need_their_kind_of_model(model, photo, tmp_path):
    recording = write_npz(tmp_path / "r.npz", random_events(100))
    with pytest.raises(ValueError, match="recording of events, and the model takes 3 channels"):
        visualize(model, [recording], tmp_path / "out", sensor_size=(34, 34), quiet=True)
    events = timm.create_model("test_qkformer", in_chans=2, pretrained_cfg_overlay=EVENTS)
    with pytest.raises(ValueError, match="is an image, and the model takes 2 channels"):
        visualize(events, [photo], tmp_path / "out", quiet=True)


def test_input_channels_that_the_config_does_not_know(photo, tmp_path):
    recording = write_npz(tmp_path / "r.npz", random_events(100))
    events = timm.create_model("test_tim", in_chans=2)
    assert ModelInputs(events, (34, 34)).read(recording).x.shape == (1, 4, 2, 32, 32)
    assert visualize(events, [recording], tmp_path / "out", sensor_size=(34, 34), untrained=True, quiet=True)
    with pytest.raises(ValueError, match=r"takes 1 channels, its config's input_size is .3, 64, 64.*overlay"):
        ModelInputs(timm.create_model("test_qkformer_ms", in_chans=1)).read(photo)


def test_an_image_is_what_the_model_sees_not_its_transpose(tmp_path):
    pixels = (planted_image()[0].permute(1, 2, 0).numpy() * 255).astype(np.uint8)
    Image.fromarray(pixels).save(tmp_path / "planted.png")
    model = planted_model()
    model.pretrained_cfg = {
        "input_size": (3, *SIZE), "mean": (0, 0, 0), "std": (1, 1, 1), "crop_pct": 1.0, "interpolation": "bicubic"
    }  # fmt: skip
    read = ModelInputs(model).read(tmp_path / "planted.png")
    assert torch.equal(read.x, planted_image())
    assert np.array_equal(read.pictures[0, 0], pixels / np.float32(255))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("broken.jpg", b"\xff\xd8 not a picture", "not a readable image"),
        ("notes.txt", b"", "neither an image nor a recording"),
        ("missing.png", None, "does not exist"),
    ],
)
def test_files_that_cannot_be_shown(model, tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises((ValueError, OSError), match=message):
        visualize(model, [tmp_path / name], tmp_path / "out", quiet=True)


def test_empty_folders_and_no_paths(model, tmp_path):
    with pytest.raises(ValueError, match="no images or recordings below it"):
        find_files(tmp_path)
    with pytest.raises(ValueError, match="paths is empty"):
        visualize(model, [], tmp_path / "out", quiet=True)
