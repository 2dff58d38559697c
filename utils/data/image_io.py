"""Reading image files: any file becomes an upright RGB image or an `ImageError` with its path and cause."""

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
from PIL import ExifTags, Image, ImageFile

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
"""File suffixes by Pillow's name of the format."""
HEIF_SUFFIXES = frozenset(SUFFIXES["HEIF"])
IMAGE_SUFFIXES = frozenset(chain(*SUFFIXES.values())) - (frozenset() if HAS_HEIF else HEIF_SUFFIXES)
"""Suffixes of image files when folders are scanned; case is ignored."""

# Formats that are opened; the suffix is ignored. Pillow's other decoders are not for photos; some start other programs
# (EPS) or are rarely tested.
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
"""Versions of the image libraries; others may decode to different pixels."""

MAX_PIXELS = TrainConfig.max_pixels
"""Larger images are refused before decoding: a small file can claim to be a huge image."""

BACKGROUND = (255, 255, 255)
"""Background color behind transparent images."""

MIN_OVERSAMPLING = 1.5
"""A JPEG is decoded at a lower scale while each side of the crop keeps this many times its target size. At 1.5, photos
differ from full decoding by one level of 255 on average (PSNR above 36 dB, about the loss of JPEG itself); at 1 by two
levels; 2 is no closer, and 12 megapixels take a third longer."""

JPEG_REDUCTIONS = {
    1: cv2.IMREAD_COLOR,
    2: cv2.IMREAD_REDUCED_COLOR_2,
    4: cv2.IMREAD_REDUCED_COLOR_4,
    8: cv2.IMREAD_REDUCED_COLOR_8,
}
END_OF_JPEG = b"\xff\xd9"

# Transforms that make an image upright, by the EXIF tag Orientation; 1 is already upright.
TO_UPRIGHT = {
    2: lambda pixels: cv2.flip(pixels, 1),
    3: lambda pixels: cv2.rotate(pixels, cv2.ROTATE_180),
    4: lambda pixels: cv2.flip(pixels, 0),
    5: cv2.transpose,
    6: lambda pixels: cv2.rotate(pixels, cv2.ROTATE_90_CLOCKWISE),
    7: lambda pixels: cv2.rotate(cv2.transpose(pixels), cv2.ROTATE_180),
    8: lambda pixels: cv2.rotate(pixels, cv2.ROTATE_90_COUNTERCLOCKWISE),
}
SWAPS_AXES = (5, 6, 7, 8)

Box = tuple[float, float, float, float]
"""Left, top, right and bottom in pixels."""


class Region(NamedTuple):
    """A decoded image and the crop box in it.

    Attributes:
        pixels: uint8 (height, width, 3), upright RGB, perhaps decoded at a lower scale.
        box: the crop, in coordinates of `pixels`.
    """

    pixels: np.ndarray
    box: Box


# Pillow's warnings about large images and unusual metadata are replaced by `max_pixels` and `ImageError`.
warnings.filterwarnings("ignore", module=r"PIL\.")
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


class ImageError(InputError):
    """A file that can't be read as an image.

    Attributes:
        path: the file.
        cause: why it can't be read.
    """

    def __init__(self, message: str, path: str = "", cause: str = "") -> None:
        # A worker process sends an error as one message, its traceback followed by the original message.
        super().__init__(message.rpartition(f"{type(self).__name__}: ")[2].strip())
        self.path = path
        self.cause = cause

    @staticmethod
    def of(path: str | Path, cause: str) -> ImageError:
        """Return the error for one file."""
        return ImageError(f"{path} can't be read as an image: {cause}", str(path), cause)


def open_image(path: str | Path, max_pixels: int = MAX_PIXELS, allow_truncated: bool = False) -> Image.Image:
    """Read an image, rotate it upright by its EXIF orientation, and convert it to RGB, see `to_rgb`.

    For animations, the first frame is read. The result's `format` is the format of the file.

    Args:
        path: a file of one of `FORMATS`; the suffix is ignored.
        max_pixels: images with more pixels are refused before decoding.
        allow_truncated: read incomplete files; missing pixels are gray.

    Raises:
        ImageError: the file is missing or can't be read; all other errors are converted to this.
    """
    with _opened(path, max_pixels, allow_truncated) as image:
        return _upright_rgb(image)


class OpenImage:
    """An image file whose size is known before it is decoded.

    Attributes:
        width: of the upright image.
        height: of the upright image.
    """

    def __init__(self, path: str | Path, image: Image.Image) -> None:
        self._path = path
        self._image = image
        self._pixels: np.ndarray | None = None
        if image.format in ("JPEG", "MPO"):
            self._orientation = _orientation(image)
            self.width, self.height = image.size[::-1] if self._orientation in SWAPS_AXES else image.size
        else:  # other formats have no lower scales, and their headers aren't reliable
            self._pixels = np.array(_upright_rgb(image))
            self.height, self.width = self._pixels.shape[:2]

    def decode(self, box: Box, size: tuple[int, int]) -> Region:
        """Decode the image for a crop `box` that will be resized to `size` (height, width).

        A JPEG can be decoded at 1/2, 1/4 or 1/8 of its size in a fraction of the time, see `MIN_OVERSAMPLING`.
        """
        pixels = self._decode_jpeg(box, size) if self._pixels is None else self._pixels
        return scale_box(pixels, box, self.width, self.height)

    def _decode_jpeg(self, box: Box, size: tuple[int, int]) -> np.ndarray:
        max_reduction = min((box[2] - box[0]) / size[1], (box[3] - box[1]) / size[0]) / MIN_OVERSAMPLING
        reduction = max(n for n in JPEG_REDUCTIONS if n <= max(max_reduction, 1))
        pixels = _decode_jpeg(self._path, reduction, self._orientation) if self._image.mode == "RGB" else None
        if pixels is None:
            self._image.draft(None, tuple(math.ceil(side / reduction) for side in self._image.size))
            pixels = np.array(_upright_rgb(self._image))
        return pixels


def scale_box(pixels: np.ndarray, box: Box, width: int, height: int) -> Region:
    """Return `pixels`, a downscaled image of original size (`width`, `height`), with `box` scaled to match."""
    x_scale, y_scale = pixels.shape[1] / width, pixels.shape[0] / height
    left, top, right, bottom = box
    return Region(pixels, (left * x_scale, top * y_scale, right * x_scale, bottom * y_scale))


@contextmanager
def open_to_decode(
    path: str | Path, max_pixels: int = MAX_PIXELS, allow_truncated: bool = False
) -> Iterator[OpenImage]:
    """Open an image for decoding; arguments and errors are those of `open_image`."""
    with _opened(path, max_pixels, allow_truncated) as image:
        yield OpenImage(path, image)


def _decode_jpeg(path: str | Path, reduction: int, orientation: int) -> np.ndarray | None:
    """Decode an RGB JPEG with OpenCV: the same pixels as Pillow's, faster.

    Returns None if the file looks incomplete or broken, which is left to Pillow and its error messages.
    """
    encoded = np.fromfile(path, np.uint8)
    if encoded[-2:].tobytes() != END_OF_JPEG:
        return None
    pixels = cv2.imdecode(encoded, JPEG_REDUCTIONS[reduction] | cv2.IMREAD_IGNORE_ORIENTATION)
    if pixels is None:
        return None
    cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB, dst=pixels)
    return TO_UPRIGHT[orientation](pixels) if orientation in TO_UPRIGHT else pixels


def upright_rgb(image: Image.Image | np.ndarray) -> Image.Image:
    """Convert an image in memory as `open_image` does for files.

    Args:
        image: a Pillow image, or a uint8 array, (height, width, 3) in RGB or (height, width) in gray.

    Raises:
        ImageError: the Pillow image's file, which may be read only now, is broken.
        ValueError: the type, dtype or shape isn't one of these.
    """
    if not isinstance(image, np.ndarray | Image.Image):
        raise ValueError(f"a {type(image).__name__}: give a path, a Pillow image, or a numpy array")
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
    if (transform := TO_UPRIGHT.get(_orientation(image))) is not None:
        # Not ImageOps.exif_transpose: it rewrites all of the EXIF data and fails on tags of unusual types.
        rgb = Image.fromarray(transform(np.array(rgb)))
    rgb.format = image.format
    return rgb


def _orientation(image: Image.Image) -> int:
    """Return the EXIF orientation; 1, upright, if it is missing or the EXIF data is broken."""
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1)
    except (SyntaxError, ValueError, LookupError, struct.error):
        return 1


def read_size(path: str | Path, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """Return width and height from an image's header, in most formats before the EXIF rotation.

    Raises:
        ImageError: the file is missing, isn't an image, or has more than `max_pixels`.
    """
    with _opened(path, max_pixels) as image:
        return image.size


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert an image to RGB: on a white background if transparent, higher bit depths scaled to 8 bits.

    White is 65,535 for integers; for floats it is 1 if no value is above 1, else 255.
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
    return image if image.mode == "RGB" else image.convert("RGB")


@contextmanager
def _opened(path: str | Path, max_pixels: int = MAX_PIXELS, allow_truncated: bool = False) -> Iterator[Image.Image]:
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # reading a pipe or socket would block forever
            raise OSError("it is not a file but a folder or a pipe")
        Image.MAX_IMAGE_PIXELS = max_pixels
        with Image.open(path, formats=FORMATS) as image:
            if image.width * image.height > max_pixels:
                raise Image.DecompressionBombError  # Pillow raises this only at twice the limit
            ImageFile.LOAD_TRUNCATED_IMAGES = allow_truncated
            yield image
    except Exception as error:  # on broken files Pillow's decoders raise nearly any exception
        raise ImageError.of(path, _cause(path, error, max_pixels)) from error


def _cause(path: str | Path, error: Exception, max_pixels: int) -> str:
    """Return the reason for the user, with the package to install if one can read the format."""
    if isinstance(error, FileNotFoundError):
        return "there is no such file"
    if isinstance(error, Image.UnidentifiedImageError):
        header = b""
        with suppress(OSError), Path(path).open("rb") as file:
            header = file.read(32)
        if header[4:8] == b"ftyp" and header[8:12] in (b"heic", b"heix", b"mif1", b"msf1", b"hevc"):
            return "it is HEIC; pip install pillow-heif to read it"
        return "its image format is unknown" if header else "it is empty"
    if isinstance(error, Image.DecompressionBombError):
        return f"it has more pixels than max_pixels={max_pixels} allows; raise max_pixels or shrink the image"
    return f"{type(error).__name__}: {error}"
