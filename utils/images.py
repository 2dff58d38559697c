"""A file becomes an upright RGB picture, or an error that names it."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import Image, ImageOps


class ImageError(ValueError):
    """A file that can't be read as a picture; the message names the file and the cause."""


def open_image(path: str | Path) -> Image.Image:
    """Read a picture of any mode, turn it upright by its EXIF orientation, and make it RGB.

    Raises:
        ImageError: the file is missing or is no readable picture.
    """
    with _opened(path) as image:
        return ImageOps.exif_transpose(image).convert("RGB")


def read_size(path: str | Path) -> tuple[int, int]:
    """Width and height in pixels as the file's header says, before it is turned upright.

    Raises:
        ImageError: the file is missing or is no picture.
    """
    with _opened(path) as image:
        return image.size


@contextmanager
def _opened(path: str | Path) -> Iterator[Image.Image]:
    try:
        with Image.open(path) as image:
            yield image
    except Exception as error:  # Pillow's decoders raise nearly every type there is on a broken file
        raise ImageError(f"{path} can't be read as a picture: {type(error).__name__}: {error}") from error
