"""`--crop-padding`: images are cropped with mirrored pixels around them, not resized."""

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_runs import PLAIN, run, write_recipe
from torch.nn import functional as F

from timm_qkformer.training.trainer.config import parse_train
from timm_qkformer.training.trainer.data import create_train_loader, open_split
from timm_qkformer.training.trainer.distributed import Processes

CONFIG = {"input_size": (3, 32, 32), "mean": (0.0,) * 3, "std": (1.0,) * 3, "interpolation": "bicubic"}


def batches(folder, tmp_path, **changes):
    """Training images [B, C, H, W], pixels from 0 to 255, of two epochs."""
    recipe = write_recipe(tmp_path / "recipe.yaml", **{**PLAIN, "no_aug": False, "aa": None, **changes})
    settings = parse_train(["-c", str(recipe), "--data-dir", str(folder)])
    dataset = open_split(settings, "train", True, CONFIG["input_size"], 1)
    loader = create_train_loader(settings, Processes(torch.device("cpu")), dataset, CONFIG)
    return torch.cat([images for _ in range(2) for images, _ in loader.batches]).mul(255).round()


def test_every_image_is_a_window_of_the_mirrored_picture(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    for name in ("a", "b"):
        (tmp_path / "train" / name).mkdir(parents=True)
        for i in range(8):
            Image.fromarray(pixels).save(tmp_path / "train" / name / f"{i}.png")
    images = batches(tmp_path, tmp_path, crop_padding=2, hflip=0.0, color_jitter=0.0, num_classes=2)
    picture = torch.from_numpy(pixels).permute(2, 0, 1).float()
    windows = F.pad(picture[None], (2,) * 4, mode="reflect")[0].unfold(1, 32, 1).unfold(2, 32, 1)
    windows = windows.permute(1, 2, 0, 3, 4).flatten(0, 1)  # 25 of them
    found = [(windows == image).flatten(1).all(1).nonzero().flatten().tolist() for image in images]
    assert all(len(of_image) == 1 for of_image in found)
    assert len({of_image[0] for of_image in found}) > 8


def test_larger_pictures_are_resized_first(data, tmp_path):
    assert batches(data, tmp_path, crop_padding=4).shape == (48, 3, 32, 32)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"crop_padding": -1}, "crop_padding=-1 needs to be at least 0"),
        ({"crop_padding": 2, "no_aug": True}, "crop_padding=2 is a way to crop, and so is no_aug"),
        ({"crop_padding": 2, "train_crop_mode": "rkrc"}, "and so is train_crop_mode='rkrc'"),
        ({"crop_padding": 32, "img_size": 32}, "crop_padding=32 must be below the 32 pixels"),
    ],
)
def test_what_cannot_be_is_refused(changes, message, data, tmp_path):
    with pytest.raises(ValueError, match=message):
        run(data, tmp_path, **{**PLAIN, "no_aug": False, "aa": None, **changes})


def test_events_have_none():
    with pytest.raises(ValueError, match="crop_padding=2 is for images and has no meaning for events/nmnist"):
        parse_train(["--dataset", "events/nmnist", "--data-dir", "data", "--crop-padding", "2"])
