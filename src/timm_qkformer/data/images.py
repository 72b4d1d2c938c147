"""Image files, and errors of loaders, as one line that names the file."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from PIL import Image

from .events import EventFileError

__all__ = ["UnreadableImageError", "open_image", "readable"]


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


def readable(batches: Any) -> Iterator[Any]:
    """The batches; what cannot be read is one line, also from worker processes, which wrap it in a traceback.

    Raises:
        ValueError: Naming the image or recording.
    """
    try:
        yield from batches
    except (ValueError, RuntimeError) as error:
        names = f"{UnreadableImageError.__name__}|{EventFileError.__name__}"
        found = re.search(rf"(?:{names}): (.+)\s*\Z", str(error))
        if found is None:
            raise
        raise ValueError(found[1]) from None
