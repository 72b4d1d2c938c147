"""Labelled images that are read or named in one line, and the same for whatever a loader cannot read."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from PIL import Image
from torch.utils.data import Dataset

from .events import EventFileError


class UnreadableImageError(ValueError):
    """An image file that cannot be read; the message names it."""


def open_image(file: str | Path | IO[bytes], mode: str | None = None, path: str | Path | None = None) -> Image.Image:
    """Read and decode an image.

    Args:
        file: Where it is, or the file itself.
        mode: Pillow's mode of the result; None for the file's own.
        path: What to call it in an error; `file` if left out.

    Raises:
        UnreadableImageError: If it is not there, damaged, or no image.
    """
    try:
        with Image.open(file) as image:
            image.load()
            return image if mode is None else image.convert(mode)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # Pillow's, for broken files
        raise UnreadableImageError(f"{path or file} is not a readable image: {error}") from error


class ImageDataset(Dataset):
    """Labelled images; timm's `create_loader` sets `transform`.

    An unreadable image stops the run and is named. timm's own data set gives the next image in its place.

    Args:
        samples: Pairs of a file, open or by its path, and a class index (None: unknown). A reader of timm's will do.
        mode: Pillow's mode of the images.
        hint: Ends an error's message.
    """

    def __init__(self, samples: Any, mode: str, hint: str = "") -> None:
        self.reader = samples
        self.mode = mode
        self.hint = hint
        self.transform: Any = None

    def __len__(self) -> int:
        return len(self.reader)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        try:
            file, target = self.reader[index]
            name = self.reader.filename(index, absolute=True) if hasattr(self.reader, "filename") else file
            image = open_image(file, self.mode, name)
        except (OSError, ValueError) as error:
            raise UnreadableImageError(f"{error}{self.hint}") from error
        return (image if self.transform is None else self.transform(image)), -1 if target is None else target


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
