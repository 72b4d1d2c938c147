"""What a model is shown: images and recordings of event cameras as it takes them, noise; and its input as pictures."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from timm.data.config import resolve_model_data_config
from timm.data.readers import get_img_extensions
from timm.data.transforms_factory import create_transform
from torch import Tensor

from ..data import EVENT_SUFFIXES, EventFileError, FrameSpec, check_events, events_to_frames, read_events
from ..data.images import open_image
from ..data.sampling import draw

Array = NDArray[Any]


@dataclass(frozen=True)
class FileInput:
    """One file."""

    path: Path  # where it is
    x: Tensor  # a batch of one for the model: an image [1, C, H, W] or a clip [1, T, 2, H, W]
    pictures: Array  # the same to look at, [1, S, H, W, 3], see `input_pictures`


def find_files(path: Path) -> list[Path]:
    """The images and recordings below a folder, sorted; or the file itself.

    FileNotFoundError for no such path; ValueError for a file of an unknown kind, or a folder without one of a known.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist")
    known = (*get_img_extensions(), *EVENT_SUFFIXES)
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file() and file.suffix.lower() in known)
        if not files:
            raise ValueError(f"{path} has no images or recordings below it ({', '.join(known)})")
        return files
    if path.suffix.lower() not in known:
        raise ValueError(f"{path} is neither an image nor a recording: its suffix is none of {', '.join(known)}")
    return [path]


class ModelInputs:
    """Reads files as a model takes them: images through the transform of its config, events as frames.

    Recordings become as many frames as the model has time steps, of equal numbers of events. Where the sensor is larger
    than the model's own input size they are sampled down to it.

    Args:
        model: A model of this package, with its config (`pretrained_cfg`) and `time_steps`.
        sensor_size: (height, width) of the event camera, for recordings that do not state it.
    """

    def __init__(self, model: Any, sensor_size: tuple[int, int] | None = None) -> None:
        self.sensor_size = sensor_size
        self.time_steps: int = model.time_steps
        self.channels: int = model.in_chans
        self.config = resolve_model_data_config(model)
        self.mean: Sequence[float] = self.config["mean"]
        self.std: Sequence[float] = self.config["std"]

    def read(self, path: Path) -> FileInput:
        """Read one file; ValueError if it cannot be read, or does not suit the model's input channels."""
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
        if self.channels != self.config["input_size"][0]:  # events, which are not normalised, do without
            raise ValueError(
                f"the model takes {self.channels} channels, its config's input_size is {self.config['input_size']}: "
                "create it with a pretrained_cfg_overlay of input_size, mean and std for its channels"
            )
        transform: Any = create_transform(**self.config)
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


def noise_data(model: Any, samples: int, seed: int = 0) -> tuple[str, Iterator[Tensor]]:
    """Noise of the shape of a model's input, and what to call it.

    Images are normally distributed, mean 0 and variance 1, as normalised pixels are on average; clips for models of two
    channels, which are for events, have a count drawn from a Poisson distribution of mean 0.1 in every pixel and step.
    """
    if samples < 1:
        raise ValueError(f"samples={samples} must be at least 1")
    config: dict[str, Any] = getattr(model, "pretrained_cfg", None) or {}
    _, height, width = config.get("input_size", (3, 224, 224))
    generator = torch.Generator().manual_seed(seed)
    if model.in_chans == 2:
        shape = (1, model.time_steps, 2, height, width)
        drawn = (torch.poisson(torch.full(shape, 0.1), generator) for _ in range(samples))
        return f"{samples} clips of random noise (Poisson counts of mean 0.1, seed {seed}), no real recordings", drawn
    drawn = (torch.randn(1, model.in_chans, height, width, generator=generator) for _ in range(samples))
    return f"{samples} images of random noise (normally distributed, seed {seed}), no real images", drawn


def file_data(
    model: Any, folder: Path, limit: int | None = None, sensor_size: tuple[int, int] | None = None
) -> tuple[str, Iterator[Tensor]]:
    """Images or recordings below a folder as the model takes them, one by one, and what to call them.

    Args:
        model: A model with its config.
        folder: Folder, or a file.
        limit: Take so many, the first ones of a fixed random order of all. None: all, sorted.
        sensor_size: (height, width) of the event camera, see `ModelInputs`.

    Raises:
        ValueError: For a `limit` below 1, or files that the model cannot take.
        FileNotFoundError: If there is no such folder.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit={limit} must be at least 1")
    files = find_files(folder)
    name = f"{len(files)} files of {folder.name}"
    drawn = draw(files, limit)
    if len(drawn) < len(files):
        name = f"{limit} of {name}, drawn at random"
    inputs = ModelInputs(model, sensor_size)
    return name, (inputs.read(path).x for path in drawn)


def input_pictures(x: Tensor, mean: Sequence[float] = (), std: Sequence[float] = ()) -> Array:
    """A model's input as pictures: float32 [B, S, H, W, 3] between 0 and 1, S = 1 for images and T for clips.

    Two channels are polarities, "off" first: grey where nothing happens, lighter where "on" events outnumber the
    "off" events, darker where they are outnumbered. Three are red, green and blue. Anything else is averaged to grey.

    Args:
        x: Images [B, C, H, W] or clips [B, T, C, H, W], normalised as the model takes them.
        mean, std: What the normalisation subtracted and divided by, one for each channel; empty for none.
    """
    frames = x.detach().cpu().float().numpy()
    if frames.ndim == 4:
        frames = frames[:, None]
    channels = frames.shape[2]
    for name, values in (("mean", mean), ("std", std)):
        if len(values) not in (0, channels):
            raise ValueError(f"{name}={tuple(values)} needs one entry for each of the input's {channels} channels")
    if len(std):
        frames = frames * np.asarray(std, np.float32)[:, None, None]
    if len(mean):
        frames = frames + np.asarray(mean, np.float32)[:, None, None]
    if channels == 2:
        balance = frames[:, :, 1] - frames[:, :, 0]
        largest = np.array([_largest(clip) for clip in balance], np.float32)
        frames = (0.5 + 0.5 * balance / largest[:, None, None, None])[:, :, None]
    elif channels != 3:
        frames = frames.mean(2, keepdims=True)
    pictures = np.broadcast_to(frames, (*frames.shape[:2], 3, *frames.shape[3:])).transpose(0, 1, 3, 4, 2)
    return pictures.clip(0.0, 1.0)


def _largest(balance: Array) -> float:
    """Where the grey scale of a clip ends: almost its largest value, so that one noisy pixel does not darken it all."""
    events = np.abs(balance[balance != 0.0])
    return float(np.quantile(events, 0.98)) if events.size else 1.0
