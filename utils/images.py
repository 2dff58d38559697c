"""A file becomes an upright RGB picture, or an error that names it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

IMAGE_SUFFIXES = frozenset(
    [
        ".jpg",
        ".jpeg",
        ".jpe",
        ".jfif",
        ".png",
        ".bmp",
        ".gif",
        ".tif",
        ".tiff",
        ".webp",
        ".ppm",
        ".pgm",
        ".jp2",
        ".avif",
    ]
)
"""Files with these, in upper or lower case, are taken for pictures when folders are scanned."""

BACKGROUND = (255, 255, 255)
"""What transparent pictures are laid on."""


class ImageError(ValueError):
    """A file that can't be read as a picture; the message names the file and the cause."""


def open_image(path: str | Path) -> Image.Image:
    """Read a picture of any mode, turn it upright by its EXIF orientation, and make it RGB, see `to_rgb`.

    Raises:
        ImageError: the file is missing or is no readable picture.
    """
    with _opened(path) as image:
        return to_rgb(ImageOps.exif_transpose(image))


def to_rgb(image: Image.Image) -> Image.Image:
    """Make a picture RGB: transparent ones are laid on white, and deeper ones scaled to 8 bits.

    Of whole numbers, 65,535 is white; of floats, 1 is white if there is none above it, else 255.
    """
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image).clip(0, 65535) / 257).round().astype(np.uint8))
    elif image.mode == "F":
        values = np.nan_to_num(np.asarray(image))
        image = Image.fromarray((values * (255 if values.max() <= 1 else 1)).clip(0, 255).round().astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        background = Image.new("RGBA", image.size, (*BACKGROUND, 255))
        image = Image.alpha_composite(background, image)
    return image.convert("RGB")


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
