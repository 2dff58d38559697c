"""A file becomes an upright RGB image, or an error that names it and says why."""

from __future__ import annotations

import importlib.util
import math
import os
import stat
import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import PIL
from PIL import ExifTags, Image, ImageCms, ImageFile

from utils.config.train_config import TrainConfig
from utils.system.errors import InputError

HAS_HEIF = importlib.util.find_spec("pillow_heif") is not None
if HAS_HEIF:
    import pillow_heif

    pillow_heif.register_heif_opener()

SUFFIXES = {
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif"),
    "MPO": (".jpg", ".jpeg", ".jpe", ".jfif"),
    "PNG": (".png",),
    "GIF": (".gif",),
    "BMP": (".bmp",),
    "DIB": (".bmp",),
    "TIFF": (".tif", ".tiff"),
    "WEBP": (".webp",),
    "PPM": (".ppm", ".pgm"),
    "JPEG2000": (".jp2",),
    "AVIF": (".avif",),
    "HEIF": (".heic", ".heif"),
}
"""What files of a format are called, by Pillow's name for it."""
HEIF_SUFFIXES = frozenset(SUFFIXES["HEIF"])
IMAGE_SUFFIXES = frozenset(chain(*SUFFIXES.values())) - (frozenset() if HAS_HEIF else HEIF_SUFFIXES)
"""Files with these, in upper or lower case, are taken for images when folders are scanned."""

# What a file may be, whatever its name says. Pillow knows more formats; those left out are no photos, and some of their
# decoders start other programs (EPS) or are hardly ever tried.
Image.init()
FORMATS = [
    name
    for name in (
        *("JPEG", "PNG", "WEBP", "AVIF", "BMP", "DIB", "GIF", "HEIF", "ICO", "JPEG2000", "MPO", "PCX", "PPM", "SGI"),
        *("TGA", "TIFF"),
    )
    if name in Image.OPEN
]

READERS = f"Pillow {PIL.__version__}, OpenCV {cv2.__version__}{', pillow-heif' if HAS_HEIF else ''}"
"""What reads images here: another version may read more, or give other pixels."""

MAX_PIXELS = TrainConfig.max_pixels
"""An image of more is refused before it is decoded: a small file can claim to be a huge image."""

BACKGROUND = (255, 255, 255)
"""What transparent images are laid on."""


DETAIL = 1.5
"""A JPEG is decoded at a lower scale as long as the part that is wanted keeps this many times the pixels, on each side,
of what it is resized to. At 1.5 photos differ from those decoded whole by one level of 255 in the mean (PSNR above
36 dB, which is about what JPEG itself takes); at 1 by two levels; at 2 by no less, and 12
megapixels take a third longer."""

JPEG_REDUCTIONS = {
    1: cv2.IMREAD_COLOR,
    2: cv2.IMREAD_REDUCED_COLOR_2,
    4: cv2.IMREAD_REDUCED_COLOR_4,
    8: cv2.IMREAD_REDUCED_COLOR_8,
}
END_OF_JPEG = b"\xff\xd9"

# By the EXIF tag Orientation, of which 1 is upright.
UPRIGHT = {
    2: lambda pixels: cv2.flip(pixels, 1),
    3: lambda pixels: cv2.rotate(pixels, cv2.ROTATE_180),
    4: lambda pixels: cv2.flip(pixels, 0),
    5: cv2.transpose,
    6: lambda pixels: cv2.rotate(pixels, cv2.ROTATE_90_CLOCKWISE),
    7: lambda pixels: cv2.rotate(cv2.transpose(pixels), cv2.ROTATE_180),
    8: lambda pixels: cv2.rotate(pixels, cv2.ROTATE_90_COUNTERCLOCKWISE),
}
LYING = (5, 6, 7, 8)

Box = tuple[float, float, float, float]
"""Left, top, right and bottom of a part of an image, in its pixels."""


class Region(NamedTuple):
    """An image and the part of it that is wanted.

    Attributes:
        pixels: uint8 (height, width, 3), upright RGB; perhaps smaller than the file says.
        box: the part, in the pixels that are there.
    """

    pixels: np.ndarray
    box: Box


# Pillow warns of large images and odd metadata; here limits and errors decide.
warnings.filterwarnings("ignore", module=r"PIL\.")
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


class ImageError(InputError):
    """A file that can't be read as an image.

    Attributes:
        path: the file.
        cause: why not.
    """

    def __init__(self, message: str, path: str = "", cause: str = "") -> None:
        # A worker process passes an error on as one message, with its traceback before the error's own words.
        super().__init__(message.rpartition(f"{type(self).__name__}: ")[2].strip())
        self.path = path
        self.cause = cause

    @staticmethod
    def of(path: str | Path, cause: str) -> ImageError:
        """The error for one file."""
        return ImageError(f"{path} can't be read as an image: {cause}", str(path), cause)


def open_image(path: str | Path, max_pixels: int = MAX_PIXELS, allow_truncated: bool = False) -> Image.Image:
    """Read an image, turn it upright by its EXIF orientation, and make it RGB, see `to_rgb`.

    Of an animation it is the first frame. The image's `format` says what the file is.

    Args:
        path: the file, of one of `FORMATS`, whatever its suffix.
        max_pixels: an image that says it has more is refused unread.
        allow_truncated: take what there is of a file that ends too early; what is missing is grey.

    Raises:
        ImageError: the file is missing or is no readable image; whatever else goes wrong in reading it becomes this.
    """
    with _opened(path, max_pixels, allow_truncated) as image:
        return _upright_rgb(image)


class OpenImage:
    """An image whose header has been read: its size is known before it is decoded, which depends on what is wanted.

    Attributes:
        width: of the upright image, in pixels.
        height: likewise.
    """

    def __init__(self, path: str | Path, image: Image.Image) -> None:
        self._path = path
        self._image = image
        self._pixels: np.ndarray | None = None
        if image.format in ("JPEG", "MPO"):
            self._orientation = _orientation(image)
            self.width, self.height = image.size[::-1] if self._orientation in LYING else image.size
        else:  # only JPEGs can be decoded at a lower scale, and not every header of the others is right
            self._pixels = np.array(_upright_rgb(image))
            self.height, self.width = self._pixels.shape[:2]

    def decode(self, box: Box, size: tuple[int, int]) -> Region:
        """The part `box` of the upright image, decoded no finer than it is needed.

        A JPEG can be decoded at a half, a quarter or an eighth of its size, in a fraction of the time; see `DETAIL` for
        when it is.

        Args:
            box: the part that is wanted.
            size: height and width that it will be resized to.
        """
        pixels = self._decode_jpeg(box, size) if self._pixels is None else self._pixels
        return scale_box(pixels, box, self.width, self.height)

    def _decode_jpeg(self, box: Box, size: tuple[int, int]) -> np.ndarray:
        spare = min((box[2] - box[0]) / size[1], (box[3] - box[1]) / size[0]) / DETAIL
        reduction = max(n for n in JPEG_REDUCTIONS if n <= max(spare, 1))
        pixels = _decode_jpeg(self._path, reduction, self._orientation) if self._image.mode == "RGB" else None
        if pixels is None:
            self._image.draft(None, tuple(math.ceil(side / reduction) for side in self._image.size))
            pixels = np.array(_upright_rgb(self._image))
        return pixels


def scale_box(pixels: np.ndarray, box: Box, width: int, height: int) -> Region:
    """The region that is the part `box` of an image of this width and height, of which `pixels` is a smaller
    version."""
    across, down = pixels.shape[1] / width, pixels.shape[0] / height
    left, top, right, bottom = box
    return Region(pixels, (left * across, top * down, right * across, bottom * down))


@contextmanager
def open_to_decode(
    path: str | Path, max_pixels: int = MAX_PIXELS, allow_truncated: bool = False
) -> Iterator[OpenImage]:
    """An image to decode a part of; the arguments and errors are those of `open_image`."""
    with _opened(path, max_pixels, allow_truncated) as image:
        yield OpenImage(path, image)


def _decode_jpeg(path: str | Path, reduction: int, orientation: int) -> np.ndarray | None:
    """An RGB JPEG by OpenCV, which gives the same pixels as Pillow in less time; None if it isn't plainly whole, which
    Pillow is then left to judge."""
    encoded = np.fromfile(path, np.uint8)
    if encoded[-2:].tobytes() != END_OF_JPEG:
        return None
    pixels = cv2.imdecode(encoded, JPEG_REDUCTIONS[reduction] | cv2.IMREAD_IGNORE_ORIENTATION)
    if pixels is None:
        return None
    cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB, dst=pixels)
    return UPRIGHT[orientation](pixels) if orientation in UPRIGHT else pixels


def upright_rgb(image: Image.Image | np.ndarray) -> Image.Image:
    """An image in memory as `open_image` gives one from a file: of Pillow's, or an array of uint8, (height, width, 3)
    in RGB or (height, width) in grey.

    Raises:
        ImageError: the file behind the image, which Pillow reads only now, is broken.
        ValueError: it is neither, or the array is of another type or shape.
    """
    if not isinstance(image, np.ndarray | Image.Image):
        raise ValueError(f"a {type(image).__name__}: give a path, an Pillow image, or a numpy array")
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim not in (2, 3) or image.shape[2:] not in ((), (3,)) or not image.size:
            raise ValueError(
                f"an array of {image.dtype} and shape {image.shape}: give uint8 from 0 to 255, (height, width, 3) in "
                f"RGB or (height, width)"
            )
        image = Image.fromarray(image)
    try:
        return _upright_rgb(image.copy())
    except (OSError, SyntaxError) as error:
        raise ImageError.of(getattr(image, "filename", "") or "an image in memory", str(error)) from error


def _upright_rgb(image: Image.Image) -> Image.Image:
    image.load()
    rgb = to_rgb(image)
    if (turn := UPRIGHT.get(_orientation(image))) is not None:
        # Not ImageOps.exif_transpose, which writes all of the EXIF anew and fails on a tag of another type than usual.
        rgb = Image.fromarray(turn(np.array(rgb)))
    rgb.format = image.format
    return rgb


def _orientation(image: Image.Image) -> int:
    """The EXIF tag; 1, upright, where there is none, or none that can be read: the image is whole all the same."""
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1)
    except (SyntaxError, ValueError, LookupError, struct.error):
        return 1


def read_size(path: str | Path, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """Width and height that an image's header says, in most formats before it is turned upright. No more is read.

    Raises:
        ImageError: the file is missing, is no image, or says it has more than `max_pixels`.
    """
    with _opened(path, max_pixels) as image:
        return image.size


def to_rgb(image: Image.Image) -> Image.Image:
    """Make an image RGB: transparent ones are laid on white, and deeper ones scaled to 8 bits.

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
        with Image.open(path, formats=FORMATS) as image:
            if image.width * image.height > max_pixels:
                raise Image.DecompressionBombError  # as Pillow itself does from twice as many on
            ImageFile.LOAD_TRUNCATED_IMAGES = allow_truncated
            yield image
    except Exception as error:  # Pillow's decoders raise nearly every type there is on a broken file
        raise ImageError.of(path, _cause(path, error, max_pixels)) from error


def _cause(path: str | Path, error: Exception, max_pixels: int) -> str:
    """Why it failed, in words for the user; names the plug-in that would have read it, if there is one."""
    missing = isinstance(error, FileNotFoundError)
    kind = b""
    if isinstance(error, Image.UnidentifiedImageError):
        with suppress(OSError), Path(path).open("rb") as file:
            kind = file.read(32)
        if kind[4:8] == b"ftyp" and kind[8:12] in (b"heic", b"heix", b"mif1", b"msf1", b"hevc"):
            return "it is HEIC; pip install pillow-heif to read it"
        if kind[4:8] == b"ftyp" and kind[8:12] in (b"avif", b"avis"):
            return "it is AVIF, which this build of Pillow lacks; pip install -U pillow to read it"
        return "it is of no known image format" if kind else "it is empty"
    if isinstance(error, Image.DecompressionBombError):
        return (
            f"it has more pixels than max_pixels={max_pixels} allows; raise that, a setting of train.py and "
            f"txt_annotation.py, or shrink the image"
        )
    return "there is no such file" if missing else f"{type(error).__name__}: {error}"
