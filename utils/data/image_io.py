"""Reading image files: any file becomes an upright RGB image or an `ImageError` with its path and cause."""

from __future__ import annotations

import importlib.util
import os
import re
import stat
import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import chain
from pathlib import Path
from typing import BinaryIO, NamedTuple

import cv2
import numpy as np
import PIL
import simplejpeg
from PIL import ExifTags, Image, ImageFile, TiffImagePlugin
from PIL.JpegImagePlugin import JpegImageFile

from utils.config.train_config import TrainConfig
from utils.data.decode_budget import IN_MEMORY, MOST_PER_PIXEL, budget, bytes_per_pixel
from utils.data.jpeg import DamagedJpeg, decode_jpeg, has_too_many_scans
from utils.system.errors import InputError
from utils.system.files import format_bytes

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

READERS = f"Pillow {PIL.__version__}, simplejpeg {simplejpeg.__version__}{', pillow-heif' if HAS_HEIF else ''}"
"""Versions of the image libraries; others may decode to different pixels."""

MAX_PIXELS = TrainConfig.max_pixels
"""Images that decode to more pixels are refused before decoding: a small file can claim to be a huge image."""

LENGTH_PER_PIXEL = 8
"""Bytes per pixel of the longest file that is read: uncompressed RGBA of 16 bits."""
MIN_LENGTH_LIMIT = 64 << 20
"""Bytes that a file may have for any `max_pixels`."""
TIFF_HEADERS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")

JPEG2000_SPACES = (12, 16, 17, 18)
"""CMYK, sRGB, gray and YCbCr, by their numbers in JPEG 2000."""
MAX_HEADER = 1 << 20
"""Bytes at the start of a file in which its colors are described."""

# Starts of files, by format; such a file that can't even be opened is broken.
MAGIC = {
    "JPEG": rb"\xff\xd8\xff",
    "PNG": rb"\x89PNG",
    "GIF": rb"GIF8",
    "WEBP": rb"RIFF.{4}WEBP",
    "AVIF": rb".{4}ftypavi[fs]",
    "HEIF": rb".{4}ftyp(hei[cxms]|hev[cxms]|mif1|msf1)",
}

WHITE_16 = 65_535
"""White in images of 16 bits; wider integers are read as such."""

BACKGROUND = (255, 255, 255)
"""Background color behind transparent images."""

MIN_OVERSAMPLING = 1.5
"""A JPEG is decoded at a lower scale while each side of the crop keeps this many times its target size. At 1.5, photos
differ from full decoding by one level of 255 on average (PSNR above 36 dB, about the loss of JPEG itself); at 1 by two
levels; 2 is no closer, and 12 megapixels take a third longer."""

JPEG_FORMATS = ("JPEG", "MPO")
JPEG_REDUCTIONS = (1, 2, 4, 8)

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
        missing: whether the file can't be reached, as on a disk that was disconnected; False: its content is at fault.
    """

    def __init__(self, message: str, path: str = "", cause: str = "", missing: bool = False) -> None:
        super().__init__(message)
        self.path = path
        self.cause = cause
        self.missing = missing

    @staticmethod
    def of(path: str | Path, cause: str, missing: bool = False) -> ImageError:
        """Return the error for one file."""
        return ImageError(f"{path} can't be read as an image: {cause}", str(path), cause, missing)


class _Unsupported(ValueError):
    """An intact image that can't be read right; the message is for the user."""


def open_image(path: str | Path, max_pixels: int = MAX_PIXELS, allow_truncated: bool = False) -> Image.Image:
    """Read an image, rotate it upright by its EXIF orientation, and convert it to RGB, see `to_rgb`.

    For animations, the first frame is read. The result's `format` is the format of the file.

    Args:
        path: a file of one of `FORMATS`; the suffix is ignored.
        max_pixels: images with more pixels are refused before decoding, except that a JPEG is decoded at 1/2, 1/4 or
            1/8 of its size to stay within this number.
        allow_truncated: read incomplete and damaged files; missing pixels are gray.

    Raises:
        ImageError: the file is missing or can't be read; all other errors are converted to this.
    """
    with _opened(path, max_pixels, allow_truncated) as file, budget.take(file.memory):
        image = Image.fromarray(file.decode(file.min_reduction))
        image.format = file.image.format
        return image


class _File(NamedTuple):
    """An image file, opened but not yet decoded.

    Attributes:
        path: the file.
        image: its header.
        min_reduction: the smallest of `JPEG_REDUCTIONS` at which it may be decoded; 1 for other formats.
        memory: bytes that decoding takes at most.
        max_pixels: see `open_image`.
        allow_truncated: see `open_image`.
    """

    path: str | Path
    image: Image.Image
    min_reduction: int
    memory: int
    max_pixels: int
    allow_truncated: bool

    def decode(self, reduction: int) -> np.ndarray:
        """Return the pixels, uint8 (height, width, 3), upright RGB, at 1 / `reduction` of the size."""
        pixels = self._decode_jpeg(reduction) if self.image.format in JPEG_FORMATS else None
        if pixels is None:
            _reduce(self.image, reduction)
            return np.array(_upright_rgb(self.image))
        return _turn_upright(pixels, self.image)

    def _decode_jpeg(self, reduction: int) -> np.ndarray | None:
        """Decode a JPEG, strictly unless `allow_truncated`; None if it is left to Pillow."""
        data = Path(self.path).read_bytes()
        return _decode_strictly(data, self.image.size, reduction, self.max_pixels, self.allow_truncated)


def _decode_strictly(
    data: bytes, size: tuple[int, int], reduction: int, max_pixels: int, allow_truncated: bool
) -> np.ndarray | None:
    """See `decode_jpeg`; None also if the data are damaged and that is allowed."""
    if has_too_many_scans(data, size[0] * size[1], max_pixels):
        raise _Unsupported("a progressive JPEG of so many scans takes too long; save it as a JPEG again")
    try:
        return decode_jpeg(data, size, reduction)
    except DamagedJpeg:
        if not allow_truncated:
            raise
        return None


class OpenImage:
    """An image file whose size is known before it is decoded.

    Attributes:
        width: of the upright image.
        height: of the upright image.
    """

    def __init__(self, file: _File) -> None:
        self._file = file
        self._pixels: np.ndarray | None = None
        image = file.image
        if image.format in JPEG_FORMATS:
            self.width, self.height = image.size[::-1] if _orientation(image) in SWAPS_AXES else image.size
        else:  # other formats have no lower scales, and their headers aren't reliable
            self._pixels = file.decode(1)
            self.height, self.width = self._pixels.shape[:2]

    def decode(self, box: Box, size: tuple[int, int]) -> Region:
        """Decode the image for a crop `box` that will be resized to `size` (height, width).

        A JPEG can be decoded at 1/2, 1/4 or 1/8 of its size in a fraction of the time, see `MIN_OVERSAMPLING`, and in
        less memory.
        """
        pixels = self._decode_jpeg(box, size) if self._pixels is None else self._pixels
        return scale_box(pixels, box, self.width, self.height)

    def _decode_jpeg(self, box: Box, size: tuple[int, int]) -> np.ndarray:
        max_reduction = min((box[2] - box[0]) / size[1], (box[3] - box[1]) / size[0]) / MIN_OVERSAMPLING
        reduction = max(n for n in JPEG_REDUCTIONS if n <= max(max_reduction, self._file.min_reduction))
        return self._file.decode(reduction)


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
    with _opened(path, max_pixels, allow_truncated) as file, budget.take(file.memory):
        yield OpenImage(file)


def upright_rgb(
    image: Image.Image | np.ndarray, max_pixels: int = MAX_PIXELS, allow_truncated: bool = False
) -> Image.Image:
    """Convert an image in memory as `open_image` does for files.

    Args:
        image: a Pillow image, or a uint8 array, (height, width, 3) in RGB or (height, width) in gray.
        max_pixels: of a Pillow image whose file is read only now; a JPEG isn't decoded at a lower scale.
        allow_truncated: see `open_image`.

    Raises:
        ImageError: the Pillow image's file, which may be read only now, is refused as by `open_image`, or its values
            have no known white.
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
    is_unread = getattr(image, "fp", None) is not None
    try:
        if is_unread:
            _check_header(image, max_pixels)
        elif getattr(image, "tile", None):
            raise _Unsupported("its file was closed before it was read; give its path")
        with budget.take(max(MOST_PER_PIXEL, bytes_per_pixel(image)) * image.width * image.height):
            pixels = _decode_opened(image, max_pixels, allow_truncated) if is_unread else None
            if pixels is not None:
                return Image.fromarray(pixels)
            rgb = _upright_rgb(image)
            return rgb.copy() if rgb is image else rgb
    except Exception as error:  # as in `_opened`
        name = getattr(image, "filename", "") or "an image in memory"
        raise ImageError.of(name, _cause(name, error, max_pixels)) from error


def _check_header(image: Image.Image, max_pixels: int) -> None:
    """Raise `_Unsupported` if an opened image isn't to be decoded."""
    if image.width * image.height > max_pixels:
        raise _Unsupported(
            f"it has {image.width} x {image.height} pixels, more than max_pixels={max_pixels} allows; shrink it, or "
            f"give its path: a large JPEG is then decoded at a lower scale"
        )
    _memory(image, 1, max_pixels)
    position = image.fp.tell()
    length = image.fp.seek(0, os.SEEK_END)
    if length > _max_length(max_pixels):
        image.fp.seek(0)
        _check_long(image.fp, length, max_pixels)
    image.fp.seek(position)


def _decode_opened(image: Image.Image, max_pixels: int, allow_truncated: bool) -> np.ndarray | None:
    """Return the pixels of an opened JPEG as for files; None for others, which are left to Pillow."""
    ImageFile.LOAD_TRUNCATED_IMAGES = allow_truncated
    if image.format not in JPEG_FORMATS:
        return None
    position = image.fp.tell()
    image.fp.seek(0)
    data = image.fp.read()
    image.fp.seek(position)
    as_file = image.mode == "RGB" and image.tell() == 0  # not another frame, or made gray by `draft`
    # Others are decoded at the lowest scale, to see damage.
    reduction = 1 if as_file else max(JPEG_REDUCTIONS)
    pixels = _decode_strictly(data, image.size, reduction, max_pixels, allow_truncated)
    return _turn_upright(pixels, image) if as_file and pixels is not None else None


def _upright_rgb(image: Image.Image) -> Image.Image:
    if image.format == "JPEG2000" and image.fp is not None:
        _check_jpeg2000(image.fp)
    image.load()
    _mend_palette(image)
    rgb = to_rgb(image)
    if (transform := TO_UPRIGHT.get(_orientation(image))) is not None:
        # Not ImageOps.exif_transpose: it rewrites all of the EXIF data and fails on tags of unusual types.
        rgb = Image.fromarray(transform(np.array(rgb)))
    rgb.format = image.format
    return rgb


def _turn_upright(pixels: np.ndarray, image: Image.Image) -> np.ndarray:
    """Return `pixels` turned by the EXIF orientation of `image`."""
    orientation = _orientation(image)
    return TO_UPRIGHT[orientation](pixels) if orientation in TO_UPRIGHT else pixels


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
    with _opened(path, max_pixels) as file:
        return file.image.size


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert an image to RGB: on a white background if transparent, higher bit depths scaled to 8 bits.

    White is the largest value of the bit depth for integers (those of 32 bits are read as 16 bits), and 1 for floats.
    Alpha that is 0 everywhere is ignored: the image would be blank.

    Raises:
        _Unsupported: values are outside this range, or the channels can't be read right.
    """
    _check_channels(image)
    if image.mode == "F" or image.mode.startswith("I"):
        image = Image.fromarray(_scale_to_8_bits(image))
    if image.has_transparency_data and not _has_unknown_channel(image):
        rgba = image.convert("RGBA")
        if rgba.getchannel("A").getextrema() == (0, 0):
            return Image.merge("RGB", rgba.split()[:3])
        image = Image.alpha_composite(Image.new("RGBA", image.size, (*BACKGROUND, 255)), rgba)
    return image if image.mode == "RGB" else image.convert("RGB")


def _scale_to_8_bits(image: Image.Image) -> np.ndarray:
    """Return an image of mode I or F as uint8; missing values (NaN) become black."""
    values = np.asarray(image)
    if image.mode == "F":
        white, values = 1, np.where(np.isnan(values), 0, values)
    else:
        bits = _tag(image, TiffImagePlugin.BITSPERSAMPLE, 16)
        signed = _tag(image, TiffImagePlugin.SAMPLEFORMAT, 1) == 2
        white = {(12, False): 4095, (16, True): 32_767}.get((bits, signed), WHITE_16)
        if bits == 32 and not signed:
            values = values.view(np.uint32)
    low, high = values.min(), values.max()
    if low < 0 or high > white:
        raise _Unsupported(
            f"its values go from {low:g} to {high:g}, so black and white are unknown; save it with values from 0 "
            f"(black) to {white} (white)"
        )
    if _tag(image, TiffImagePlugin.PHOTOMETRIC_INTERPRETATION, 1) == 0:
        values = white - values
    return np.multiply(values, 255 / white, dtype=np.float32).round().astype(np.uint8)


def _tag(image: Image.Image, number: int, default: int) -> int:
    """Return a tag of a TIFF, its first value if there are several; `default` if it is missing or for other formats."""
    value = getattr(image, "tag_v2", {}).get(number, default)
    return value[0] if isinstance(value, tuple) else value


def _check_channels(image: Image.Image) -> None:
    """Raise `_Unsupported` for TIFFs that Pillow opens but reads wrong."""
    bits = _tag(image, TiffImagePlugin.BITSPERSAMPLE, 1)
    planar = _tag(image, TiffImagePlugin.PLANAR_CONFIGURATION, 1) == 2
    if bits > 8 and planar and _tag(image, TiffImagePlugin.SAMPLESPERPIXEL, 1) > 1:
        raise _Unsupported(f"a TIFF with separate planes of {bits} bits isn't supported; save it as 8-bit RGB")
    if bits == 8 and _tag(image, TiffImagePlugin.SAMPLEFORMAT, 1) == 2:
        raise _Unsupported("its 8-bit integers are signed, so black is unknown; save it with values from 0 to 255")


def _check_jpeg2000(file: BinaryIO) -> None:
    """Raise `_Unsupported` for JPEG 2000 files whose order of channels or color space Pillow ignores."""
    position = file.tell()
    file.seek(0)
    boxes = dict(_boxes(file.read(MAX_HEADER)))
    file.seek(position)
    boxes = dict(_boxes(boxes.get(b"jp2h", b"")))  # none: a bare codestream
    definition = boxes.get(b"cdef", b"")[2:]
    channels = [struct.unpack_from(">HHH", definition, i) for i in range(0, len(definition) - 5, 6)]
    if any(kind == 0 and color != number + 1 for number, kind, color in channels):
        raise _Unsupported("a JPEG 2000 with channels in another order than RGB isn't supported; save it as RGB")
    color = boxes.get(b"colr", b"")
    space = int.from_bytes(color[3:7], "big")
    if color[:1] == b"\1" and space not in JPEG2000_SPACES:
        raise _Unsupported(f"a JPEG 2000 of color space {space} isn't supported; save it as RGB")


def _boxes(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Yield type and content of the boxes of a JPEG 2000 file; the last may be cut."""
    position = 0
    while position + 8 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, position)
        yield kind, data[position + 8 : position + length]
        if length < 8:  # until the end of the file, or of 64 bits: the codestream
            return
        position += length


def _mend_palette(image: Image.Image) -> None:
    """Scale the palette of TIFFs that hold 8-bit values instead of 16-bit ones, which Pillow would make black.

    Raises:
        _Unsupported: the palette is missing.
    """
    if image.mode == "P" and image.palette is None:
        raise _Unsupported("its palette is missing, so its colors are unknown")
    colors = getattr(image, "tag_v2", {}).get(TiffImagePlugin.COLORMAP, ())
    if image.mode == "P" and colors and max(colors) < 256:
        image.putpalette(np.reshape(colors, (3, -1)).T.astype(np.uint8).tobytes())


def _has_unknown_channel(image: Image.Image) -> bool:
    """Return whether the fourth channel of a TIFF isn't declared as alpha; it may be near infrared."""
    tags = getattr(image, "tag_v2", None)
    return tags is not None and image.mode == "RGBA" and TiffImagePlugin.EXTRASAMPLES not in tags


@contextmanager
def _opened(path: str | Path, max_pixels: int = MAX_PIXELS, allow_truncated: bool = False) -> Iterator[_File]:
    """Open a file without decoding it; errors within the context become `ImageError`."""
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):  # reading a pipe or socket would block forever
            raise OSError("it is not a file but a folder or a pipe")
        if status.st_size > _max_length(max_pixels):
            with Path(path).open("rb") as file:
                _check_long(file, status.st_size, max_pixels)
        Image.MAX_IMAGE_PIXELS = max_pixels
        with _open(path) as image:
            reduction = _min_reduction(path, image, max_pixels)
            ImageFile.LOAD_TRUNCATED_IMAGES = allow_truncated
            memory = _memory(image, reduction, max_pixels)
            memory += status.st_size if image.format in IN_MEMORY else 0
            yield _File(path, image, reduction, memory, max_pixels, allow_truncated)
    except Exception as error:  # on broken files Pillow's decoders raise nearly any exception
        # Errors of the system have a number, those of Pillow's decoders have none.
        missing = isinstance(error, OSError) and error.errno is not None
        raise ImageError.of(path, _cause(path, error, max_pixels), missing) from error


def _max_length(max_pixels: int) -> int:
    """Return the bytes of the longest file that is read: some formats are read whole."""
    return max(MIN_LENGTH_LIMIT, LENGTH_PER_PIXEL * max_pixels)


def _check_long(file: BinaryIO, length: int, max_pixels: int) -> None:
    """Refuse a file, which is at its start, of more than `_max_length`. TIFFs may hold many pages.

    Raises:
        _Unsupported: it isn't a TIFF.
    """
    if file.read(4) not in TIFF_HEADERS:
        raise _Unsupported(
            f"the file has {format_bytes(length)}, of which images of max_pixels={max_pixels} need at most "
            f"{format_bytes(_max_length(max_pixels))}; save it as a JPEG"
        )


def _memory(image: Image.Image, reduction: int, max_pixels: int) -> int:
    """Return the bytes that decoding at 1 / `reduction` of the size takes.

    Raises:
        _Unsupported: they are more than `max_pixels` allows.
    """
    memory = bytes_per_pixel(image) * (image.width * image.height // reduction**2)
    if memory > MOST_PER_PIXEL * max_pixels:
        raise _Unsupported(
            f"{image.width} x {image.height} pixels of {image.format} in mode {image.mode} take {format_bytes(memory)} "
            f"to decode, more than max_pixels={max_pixels} allows ({MOST_PER_PIXEL} bytes each); shrink it, save it as "
            f"an RGB JPEG, or raise max_pixels"
        )
    return memory


def _open(path: str | Path) -> Image.Image:
    try:
        return Image.open(path, formats=FORMATS)
    except Image.DecompressionBombError:
        with suppress(SyntaxError):
            return JpegImageFile(path)  # may still be decoded at a lower scale
        raise


def _min_reduction(path: str | Path, image: Image.Image, max_pixels: int) -> int:
    """Return the smallest of `JPEG_REDUCTIONS` at which an image has at most `max_pixels`; 1 for other formats.

    Raises:
        DecompressionBombError: there is none.
    """
    pixels = image.width * image.height
    if pixels <= max_pixels:
        return 1
    if image.format in JPEG_FORMATS and pixels <= max_pixels * max(JPEG_REDUCTIONS) ** 2 and _has_one_scan(path):
        return next(n for n in JPEG_REDUCTIONS if pixels <= max_pixels * n**2)
    raise Image.DecompressionBombError


def _has_one_scan(path: str | Path) -> bool:
    """Return whether a JPEG is decoded row by row. Others, such as progressive ones, take memory for all coefficients,
    at any scale."""
    with JpegImageFile(path) as image:
        size = 6 + 2 * image.layers  # of the header of a scan of all layers, at whose end Pillow stops
        image.fp.seek(-size, os.SEEK_CUR)
        return image.fp.read(3) == bytes((0, size, image.layers)) and not image.info.get("progressive")


def _reduce(image: Image.Image, reduction: int) -> None:
    """Make Pillow decode a JPEG at 1 / `reduction` of its size."""
    if reduction > 1:
        image.draft(None, tuple(max(1, side // reduction) for side in image.size))


def _cause(path: str | Path, error: Exception, max_pixels: int) -> str:
    """Return the reason for the user, with the package to install if one can read the format."""
    if isinstance(error, _Unsupported):
        return str(error)
    if isinstance(error, DamagedJpeg):
        return f"it is damaged ({error}); replace it by an intact copy, or set allow_truncated to read what is left"
    if isinstance(error, FileNotFoundError):
        return "there is no such file"
    if isinstance(error, Image.UnidentifiedImageError):
        header = b""
        with suppress(OSError), Path(path).open("rb") as file:
            header = file.read(32)
        for name, magic in MAGIC.items():
            if re.match(magic, header, re.DOTALL):
                if name == "HEIF" and not HAS_HEIF:
                    return "it is HEIC; pip install pillow-heif to read it"
                return f"it is a {name} file, incomplete or damaged; replace it by an intact copy"
        if layout := _tiff_layout(path):
            return f"a TIFF of {layout} isn't supported; save it as 8-bit RGB"
        return "its image format is unknown" if header else "it is empty"
    if isinstance(error, Image.DecompressionBombError):
        return (
            f"it has more pixels than max_pixels={max_pixels} allows; shrink it, save it as a JPEG that isn't "
            f"progressive (decoded at a lower scale), or raise max_pixels"
        )
    return f"{type(error).__name__}: {error}"


def _tiff_layout(path: str | Path) -> str:
    """Describe the channels of a TIFF that Pillow doesn't open; "" for other files."""
    try:
        with Path(path).open("rb") as file:
            directory = TiffImagePlugin.ImageFileDirectory_v2(file.read(8))
            file.seek(directory.next)
            directory.load(file)
        (bits, *_) = directory[TiffImagePlugin.BITSPERSAMPLE]
        (kind, *_) = directory.get(TiffImagePlugin.SAMPLEFORMAT, (1,))
        channels = directory.get(TiffImagePlugin.SAMPLESPERPIXEL, 1)
    except Exception:  # as in `_opened`
        return ""
    kinds = {1: "unsigned integers", 2: "signed integers", 3: "floats"}
    return f"{channels} channel{'s' * (channels > 1)} of {bits}-bit {kinds.get(kind, 'values')}"
