"""Reading images from disks that can go away: retry, and tell a missing file from a missing disk."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import TypeVar

from utils.data.image_io import ImageError
from utils.system.errors import InputError

Result = TypeVar("Result")

PAUSES = (0.1, 0.4, 1, 2, 4, 8, 15)
"""Seconds between attempts to read a file that is missing: half a minute if most others are missing too."""
PAUSES_FOR_ONE = 2
"""The number of these if most others are there."""
MAX_LOOKED_UP = 20
"""Other files that are looked up to tell a missing file from a missing disk."""


class ImagesGone(InputError):
    """Most images are missing: their disk was disconnected, or their folder was moved."""


def read_patiently(read: Callable[[], Result], num_images: int, path_of: Callable[[int], str]) -> Result:
    """Return the result of `read`, which reads one of `num_images` images; `path_of` gives the path of each.

    Raises:
        ImageError: the image can't be read, or is missing while most others are there.
        ImagesGone: it is still missing after all `PAUSES`, and so are most others.
    """
    for number, pause in enumerate(PAUSES):
        try:
            return read()
        except ImageError as error:
            if not error.missing or (number >= PAUSES_FOR_ONE and not _count_missing(num_images, path_of)[2]):
                raise
            if number == PAUSES_FOR_ONE:
                print(f"warning: {error.path} and most other images are missing: waiting for their disk", flush=True)
        time.sleep(pause)
    try:
        return read()
    except ImageError as error:
        missing, looked_up, most = _count_missing(num_images, path_of)
        if not error.missing or not most:
            raise
        raise ImagesGone(
            f"{missing} of {looked_up} images that were looked up are missing, such as {error.path}: their disk was "
            f"disconnected, or their folder was moved; bring them back, and run the same command again"
        ) from error


def _count_missing(num_images: int, path_of: Callable[[int], str]) -> tuple[int, int, bool]:
    """Return how many of some images are missing, how many were looked up, and whether most are missing."""
    indices = range(0, num_images, -(-num_images // MAX_LOOKED_UP))
    missing = sum(not os.path.exists(path_of(index)) for index in indices)
    return missing, len(indices), 2 * missing > len(indices)
