"""Small images in the text of HTML pages."""

from __future__ import annotations

import base64
import io

from PIL import Image

from utils.data.image_io import ImageError
from utils.data.preprocessing import Preprocessing
from utils.inference.explain import fit

THUMBNAIL = 160
"""Longer side of an image on a page, in pixels."""


def thumbnail_uri(path: str, preprocessing: Preprocessing) -> str:
    """A small JPEG of an image file as a data URI, or "" if the file can't be read."""
    try:
        with preprocessing.open(path) as image:
            scale = THUMBNAIL / max(image.width, image.height)
            size = max(1, round(image.height * scale)), max(1, round(image.width * scale))
            pixels = image.decode((0, 0, image.width, image.height), size).pixels
    except ImageError:
        return ""
    return to_uri(fit(Image.fromarray(pixels), THUMBNAIL))


def to_uri(image: Image.Image) -> str:
    """An image as a JPEG in a data URI."""
    file = io.BytesIO()
    image.save(file, "JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()
