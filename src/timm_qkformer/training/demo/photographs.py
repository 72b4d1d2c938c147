"""Photographs that the model has never seen: the first four of each class of CIFAR-10's test set, on one sheet."""

from importlib.resources import files
from typing import Any, cast

import torch
from timm.data import create_transform, resolve_model_data_config
from torch import nn

from .report import Answers

__all__ = ["classify_photographs"]

SIDE = 32  # pixels


@torch.inference_mode()
def classify_photographs(model: nn.Module) -> Answers:
    """Read, normalise and classify the sheet's pictures: one column for each class, in the order of the classes."""
    from PIL import Image

    config = resolve_model_data_config(model)
    transform = create_transform(**config, is_training=False)
    names = cast(dict[str, Any], model.pretrained_cfg)["label_names"]
    with files(__package__).joinpath("cifar10.png").open("rb") as file, Image.open(file) as sheet:
        places = [(column, row) for row in range(sheet.height // SIDE) for column in range(len(names))]
        pictures = [
            sheet.crop((SIDE * column, SIDE * row, SIDE * (column + 1), SIDE * (row + 1))).convert("RGB")
            for column, row in places
        ]
    images = torch.stack([transform(picture) for picture in pictures])
    labels = torch.tensor([column for column, _ in places])
    return Answers(images, labels, model(images), names, config["mean"], config["std"])
