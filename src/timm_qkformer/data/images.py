"""Labelled images that are read or named in one line, and the same for whatever a loader cannot read."""

import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

from .events import EventFileError

_logger = logging.getLogger(__name__)

_DEEP_GREY = re.compile(r"I(;16[BLN]?)?")  # Pillow's modes for grey of more than 8 bits
_PATIENCE = 50  # unreadable images in a row


class UnreadableImageError(ValueError):
    """An image file that cannot be read; the message names it."""


def open_image(file: str | Path | IO[bytes], mode: str | None = None, path: str | Path | None = None) -> Image.Image:
    """Read and decode an image. Grey of 16 bits becomes grey of 8, which Pillow's own conversion would cut off at 255.

    Args:
        file: Where it is, or the file itself.
        mode: Pillow's mode of the result; None for the file's own.
        path: What to call it in an error; `file` if left out.

    Raises:
        UnreadableImageError: If it is not there, damaged, no image, or of values whose range nobody knows: floating
            point, or whole numbers of more than 16 bits.
    """
    try:
        with Image.open(file) as opened:
            opened.load()
            image = _in_8_bits(opened)
            return image if mode is None else image.convert(mode)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # Pillow's, for broken files
        raise UnreadableImageError(f"{path or file} is not a readable image: {error}") from error


def _in_8_bits(image: Image.Image) -> Image.Image:
    """0 to 65,535 as 0 to 255; what has 8 bits is left as it is."""
    if image.mode == "F":
        raise ValueError("its pixels are floating-point numbers, whose range is unknown; convert it to 8 or 16 bits")
    if not _DEEP_GREY.fullmatch(image.mode):
        return image
    values = np.asarray(image).astype(np.int64)
    if values.size and not 0 <= values.min() <= values.max() <= 65535:
        raise ValueError(
            f"its pixels run from {values.min()} to {values.max()}, which is more than 16 bits; convert it to 8 or 16"
        )
    return Image.fromarray(((values + 128) // 257).astype(np.uint8))


class ImageDataset(Dataset):
    """Labelled images; timm's `create_loader` sets `transform`.

    An unreadable image stops the run and is named, or with `skip` the next image is given in its place.

    Args:
        samples: Pairs of a file, open or by its path, and a class index (None: unknown). A reader of timm's will do.
        mode: Pillow's mode of the images.
        hint: Ends an error's message.
        skip: Warn and give the next image, until 50 in a row are unreadable, as timm's own data set does.
    """

    def __init__(self, samples: Any, mode: str, hint: str = "", skip: bool = False) -> None:
        self.reader = samples
        self.mode = mode
        self.hint = hint
        self.skip = skip
        self.transform: Any = None

    def __len__(self) -> int:
        return len(self.reader)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        for further in range(_PATIENCE):
            try:
                image, target = self._read((index + further) % len(self))
                break
            except UnreadableImageError as error:
                if not self.skip or further == _PATIENCE - 1:
                    raise
                _logger.warning("Skipped: %s", error)
        return (image if self.transform is None else self.transform(image)), -1 if target is None else target

    def _read(self, index: int) -> tuple[Image.Image, int | None]:
        try:
            file, target = self.reader[index]
            name = self.reader.filename(index, absolute=True) if hasattr(self.reader, "filename") else file
            return open_image(file, self.mode, name), target
        except (OSError, ValueError) as error:
            raise UnreadableImageError(f"{error}{self.hint}") from error


def readable(batches: Any) -> Iterator[Any]:
    """The batches; what cannot be read is a ValueError of one line, also from workers, which wrap it in a traceback."""
    try:
        yield from batches
    except (ValueError, RuntimeError) as error:
        names = f"{UnreadableImageError.__name__}|{EventFileError.__name__}"
        found = re.search(rf"(?:{names}): (.+)\s*\Z", str(error))
        if found is not None:
            raise ValueError(found[1]) from None
        if "DataLoader worker" not in str(error):
            raise
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"a process that loads data was ended from outside ({reason}), often for want of memory: fewer --workers "
            f"or a smaller batch need less"
        ) from None
