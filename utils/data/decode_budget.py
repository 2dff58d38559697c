"""The memory that decoding images takes, shared by the threads of a process."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from PIL import Image

from utils.config.train_config import TrainConfig

MOST_PER_PIXEL = 15
"""Bytes that decoding may take for each of `max_pixels`. Formats and modes that take more may have fewer pixels."""

# Formats whose files are in memory while they are decoded.
IN_MEMORY = ("JPEG", "MPO", "WEBP", "AVIF", "HEIF")


def bytes_per_pixel(image: Image.Image) -> int:
    """Return the bytes per pixel that decoding to an RGB array takes at most, by format and mode, as measured."""
    alpha = image.mode.endswith(("A", "a")) or "transparency" in image.info
    if image.format in ("JPEG2000", "WEBP", "AVIF", "HEIF"):
        return 25 if alpha else 20
    if image.mode in ("F", "I") or alpha:
        return 17
    if image.format in ("JPEG", "MPO") and image.mode != "CMYK":
        return 10
    return MOST_PER_PIXEL


class DecodeBudget:
    """A number of bytes that threads take for a while; whoever finds too few left waits.

    Args:
        size: bytes. A larger amount takes all of them.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self.renew()

    def renew(self) -> None:
        """Forget what is taken, and by whom."""
        self._used = 0
        self._turn = threading.Lock()
        self._changed = threading.Condition()

    @contextmanager
    def take(self, amount: int) -> Iterator[None]:
        """Hold `amount` bytes within the context; requests are served in their order."""
        amount = min(amount, self._size)
        with self._turn, self._changed:
            self._changed.wait_for(lambda: self._used + amount <= self._size)
            self._used += amount
        try:
            yield
        finally:
            with self._changed:
                self._used -= amount
                self._changed.notify_all()


budget = DecodeBudget(2 * MOST_PER_PIXEL * TrainConfig.max_pixels)
"""Of this process: two of the largest images at once, or two dozen of a phone's photos."""


if hasattr(os, "register_at_fork"):  # in a forked process nobody decodes yet
    os.register_at_fork(after_in_child=budget.renew)
