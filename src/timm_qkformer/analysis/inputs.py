"""Files to look at: images and recordings of event cameras, as a given model takes them."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

import numpy as np
import torch
from PIL import Image
from timm.data.config import resolve_model_data_config
from timm.data.readers import get_img_extensions
from timm.data.transforms_factory import create_transform
from torch import Tensor

from ..data import EVENT_SUFFIXES, EventFileError, FrameSpec, check_events, events_to_frames, read_events
from ..data.images import open_image
from .pictures import Array, input_pictures

__all__ = ["FileInput", "ModelInputs", "find_files"]


@dataclass(frozen=True)
class FileInput:
    """One file.

    Attributes:
        path: Where it is.
        x: A batch of one for the model: an image [1, C, H, W] or a clip [1, T, 2, H, W].
        pictures: The same to look at, [1, S, H, W, 3], see `input_pictures`.
    """

    path: Path
    x: Tensor
    pictures: Array


def find_files(path: Path) -> list[Path]:
    """The images and recordings below a folder, sorted; or the file itself.

    Raises:
        FileNotFoundError: If there is no such path.
        ValueError: For a file of an unknown kind, or a folder without any of a known one.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist")
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file() and _is_known(file))
        if not files:
            raise ValueError(f"{path} has no images or recordings below it ({_known()})")
        return files
    if not _is_known(path):
        raise ValueError(f"{path} is neither an image nor a recording: its suffix is none of {_known()}")
    return [path]


def _is_known(path: Path) -> bool:
    return path.suffix.lower() in (*get_img_extensions(), *EVENT_SUFFIXES)


def _known() -> str:
    return ", ".join((*get_img_extensions(), *EVENT_SUFFIXES))


class ModelInputs:
    """Reads files as a model takes them: images through the transform of its config, events as frames.

    Recordings become as many frames as the model has time steps, of equal numbers of events. Where the sensor is larger
    than the model's own input size they are sampled down to it.

    Args:
        model: A model of this package, with its config (`pretrained_cfg`) and `time_steps`.
        sensor_size: (height, width) of the event camera, for recordings that do not state it: all but .aedat4.
    """

    def __init__(self, model: Any, sensor_size: Optional[tuple[int, int]] = None) -> None:
        self.sensor_size = sensor_size
        self.time_steps: int = model.time_steps
        self.channels: int = model.in_chans
        self.config = resolve_model_data_config(model)
        self.mean: Sequence[float] = self.config["mean"]
        self.std: Sequence[float] = self.config["std"]
        if self.channels != self.config["input_size"][0]:
            raise ValueError(
                f"the model takes {self.channels} channels, its config's input_size is {self.config['input_size']}: "
                "create it with a pretrained_cfg_overlay of input_size, mean and std for its channels"
            )

    def read(self, path: Path) -> FileInput:
        """Read one file.

        Raises:
            ValueError: If it cannot be read, or does not suit the model's input channels.
        """
        if path.suffix.lower() in EVENT_SUFFIXES:
            clip = self._clip(path)
            return FileInput(path, clip, input_pictures(clip))
        image = self.image(open_image(path), str(path))
        return FileInput(path, image, input_pictures(image, self.mean, self.std))

    def image(self, picture: Image.Image, name: str) -> Tensor:
        """A picture as the model takes it, [1, C, H, W]; `name` stands in the error for a model that takes none."""
        modes = {1: "L", 3: "RGB"}
        if self.channels not in modes:
            raise ValueError(f"{name} is an image, and the model takes {self.channels} channels (events have 2)")
        transform: Any = create_transform(
            self.config["input_size"],
            interpolation=self.config["interpolation"],
            mean=tuple(self.mean),
            std=tuple(self.std),
            crop_pct=self.config["crop_pct"],
            crop_mode=self.config["crop_mode"],
        )
        x: Tensor = transform(picture.convert(modes[self.channels]))
        return x.unsqueeze(0)

    def _clip(self, path: Path) -> Tensor:
        if self.channels != 2:
            raise ValueError(f"{path} is a recording of events, and the model takes {self.channels} channels, not 2")
        events = read_events(path)
        sensor_size = events.sensor_size or self.sensor_size
        if sensor_size is None:
            raise EventFileError(path, "does not state the camera's size: give sensor_size=(height, width)")
        check_events(events, sensor_size, path)
        _, height, width = self.config["input_size"]
        size = (min(height, sensor_size[0]), min(width, sensor_size[1]))
        frames = events_to_frames(events, FrameSpec(self.time_steps, size=size), sensor_size)
        return torch.from_numpy(frames.astype(np.float32)).unsqueeze(0)
