"""Decoding JPEG data: strictly, so that damage is seen, and within bounds."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import islice

import numpy as np
import simplejpeg

MAX_SCANS = 20
"""Scans of an image of the most pixels allowed; smaller images may have more. Progressive photos have about ten. Each
scan passes over all pixels, so 300 kB of empty scans can take seconds, and 2 MB a minute."""

START_OF_SCAN = b"\xff\xda"
END_OF_IMAGE = 0xD9
MARKER = re.compile(rb"\xff+[^\x00\xff\xd0-\xd7]", re.DOTALL)
"""A marker that ends the data of a scan: not an escaped 255 and not a restart."""

DAMAGE = re.compile(
    r"Premature end of JPEG file|Corrupt JPEG data: (?!\d+ extraneous bytes before marker 0x(?!c4|d[\da]))"
)
"""libjpeg's warnings that pixels are missing or wrong. Extraneous bytes between headers are harmless; before a restart,
the next scan with its Huffman table, or the end (0xd0 to 0xda, 0xc4), they are data for which no pixels were left."""


class DamagedJpeg(ValueError):
    """JPEG data of which some pixels are missing or wrong; the message is libjpeg's."""


def has_too_many_scans(data: bytes, pixels: int, max_pixels: int) -> bool:
    """Return whether an image of `pixels` would take too long to decode, see `MAX_SCANS`."""
    most = MAX_SCANS * max_pixels // min(pixels, max_pixels)
    # The plain count, which is fast, includes scans of thumbnails and later images.
    return data.count(START_OF_SCAN) > most and sum(1 for _ in islice(find_scans(data), most + 1)) > most


def find_scans(data: bytes) -> Iterator[int]:
    """Yield where the entropy-coded segment of each scan of the first image starts."""
    position = 2
    while (marker := MARKER.search(data, position)) and data[marker.end() - 1] != END_OF_IMAGE:
        position = marker.end() + int.from_bytes(data[marker.end() : marker.end() + 2], "big")
        if data[marker.end() - 1] == START_OF_SCAN[1]:
            yield position


def decode_jpeg(data: bytes, size: tuple[int, int], reduction: int) -> np.ndarray | None:
    """Return the pixels, uint8 (height, width, 3) in RGB, at 1 / `reduction` of `size` (width, height).

    None if libjpeg refuses the data or it is in CMYK: that is left to Pillow and its error messages.

    Raises:
        DamagedJpeg: pixels are missing or wrong.
    """
    least = {"min_width": -(-size[0] // reduction), "min_height": -(-size[1] // reduction)}
    try:
        if simplejpeg.decode_jpeg_header(data)[2] in ("CMYK", "YCCK"):
            simplejpeg.decode_jpeg(data, "CMYK", min_width=1, min_height=1)  # at the lowest scale, to see damage
            return None
        return simplejpeg.decode_jpeg(data, "RGB", **least)
    except ValueError as error:
        if DAMAGE.match(str(error)):
            raise DamagedJpeg(str(error)) from error
        return None
