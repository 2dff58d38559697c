"""A file becomes an upright RGB picture, or an error that names it and says why."""

from __future__ import annotations

import importlib.util
import os
import stat
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image, ImageCms, ImageFile, ImageOps

from utils.config import TrainConfig

HAS_HEIF = importlib.util.find_spec("pillow_heif") is not None
if HAS_HEIF:
    import pillow_heif

    pillow_heif.register_heif_opener()

HEIF_SUFFIXES = frozenset([".heic", ".heif"])
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
) | (HEIF_SUFFIXES if HAS_HEIF else frozenset())
"""Files with these, in upper or lower case, are taken for pictures when folders are scanned."""

# What a file may be, whatever its name says. Pillow knows more formats; those left out are no photos, and some of their
# decoders start other programs (EPS) or are hardly ever tried.
Image.init()
FORMATS = [
    name
    for name in (
        *("AVIF", "BMP", "DIB", "GIF", "HEIF", "ICO", "JPEG", "JPEG2000", "MPO", "PCX", "PNG", "PPM", "SGI", "TGA"),
        *("TIFF", "WEBP"),
    )
    if name in Image.OPEN
]

MAX_PIXELS = TrainConfig.max_pixels
"""A picture of more is refused before it is decoded: a small file can claim to be a huge picture."""

BACKGROUND = (255, 255, 255)
"""What transparent pictures are laid on."""


class ImageError(ValueError):
    """A file that can't be read as a picture.

    Attributes:
        path: the file.
        cause: why not.
    """

    def __init__(self, message: str, path: str = "", cause: str = "") -> None:
        # A worker process passes an error on as one message, with its traceback before the error's own words.
        super().__init__(message.rpartition("ImageError: ")[2].strip())
        self.path = path
        self.cause = cause

    @staticmethod
    def of(path: str | Path, cause: str) -> ImageError:
        """The error for one file."""
        return ImageError(f"{path} can't be read as a picture: {cause}", str(path), cause)


def open_image(path: str | Path, max_pixels: int = MAX_PIXELS, allow_truncated: bool = False) -> Image.Image:
    """Read a picture, turn it upright by its EXIF orientation, and make it RGB, see `to_rgb`.

    Of an animation it is the first frame.

    Args:
        path: the file, of one of `FORMATS`, whatever its suffix.
        max_pixels: a picture that says it has more is refused unread.
        allow_truncated: take what there is of a file that ends too early; what is missing is grey.

    Raises:
        ImageError: the file is missing or is no readable picture; whatever else goes wrong in reading it becomes this.
    """
    with _opened(path, max_pixels, allow_truncated) as image:
        image.load()
        ImageOps.exif_transpose(image, in_place=True)
        return to_rgb(image)


def read_size(path: str | Path) -> tuple[int, int]:
    """Width and height in pixels as the file's header says, before it is turned upright.

    Raises:
        ImageError: the file is missing or is no picture.
    """
    with _opened(path) as image:
        return image.size


def to_rgb(image: Image.Image) -> Image.Image:
    """Make a picture RGB: transparent ones are laid on white, and deeper ones scaled to 8 bits.

    Of whole numbers, 65,535 is white; of floats, 1 is white if there is none above it, else 255.
    """
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image).clip(0, 65535) / 257).round().astype(np.uint8))
    elif image.mode == "F":
        values = np.nan_to_num(np.asarray(image))
        image = Image.fromarray((values * (255 if values.max() <= 1 else 1)).clip(0, 255).round().astype(np.uint8))
    elif image.mode == "LAB":
        lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        image = ImageCms.profileToProfile(image, lab, srgb, outputMode="RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        background = Image.new("RGBA", image.size, (*BACKGROUND, 255))
        image = Image.alpha_composite(background, image)
    return image if image.mode == "RGB" else image.convert("RGB")


@contextmanager
def _opened(path: str | Path, max_pixels: int = MAX_PIXELS, allow_truncated: bool = False) -> Iterator[Image.Image]:
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # reading a pipe or socket would wait for ever
            raise OSError("no file, but a folder or a pipe")
        Image.MAX_IMAGE_PIXELS = max_pixels
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of large pictures and odd metadata; the limits here decide
            with Image.open(path, formats=FORMATS) as image:
                if image.width * image.height > max_pixels:
                    raise ValueError(f"{image.width} x {image.height} pixels are more than max_pixels={max_pixels}")
                ImageFile.LOAD_TRUNCATED_IMAGES = allow_truncated
                yield image
    except Exception as error:  # Pillow's decoders raise nearly every type there is on a broken file
        raise ImageError.of(path, _cause(path, error)) from error


def _cause(path: str | Path, error: Exception) -> str:
    """Why it failed, in words for the user; names the plug-in that would have read it, if there is one."""
    missing = isinstance(error, FileNotFoundError)
    if isinstance(error, Image.UnidentifiedImageError):
        with Path(path).open("rb") as file:
            kind = file.read(32)
        if kind[4:8] == b"ftyp" and kind[8:12] in (b"heic", b"heix", b"mif1", b"msf1", b"hevc"):
            return "it is HEIC; pip install pillow-heif to read it"
        if kind[4:8] == b"ftyp" and kind[8:12] in (b"avif", b"avis"):
            return "it is AVIF, which this build of Pillow lacks; pip install -U pillow to read it"
        return "it is of no known picture format" if kind else "it is empty"
    return "there is no such file" if missing else f"{type(error).__name__}: {error}"
