"""The memory that decoding images takes, shared by the threads of a process, or by the workers of a loader."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.context import BaseContext

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


MAX_UNITS = 1000
"""Of a budget that processes share: 3 MB each, for a phone's photo 40. Taking one is a fraction of a microsecond."""


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
        self._shared: SharedBudget | None = None

    def share(self, shared: SharedBudget) -> None:
        """From now on, take from `shared` instead."""
        self._shared = shared

    @contextmanager
    def take(self, amount: int) -> Iterator[None]:
        """Hold `amount` bytes within the context; requests are served in their order."""
        if self._shared is not None:
            with self._shared.take(amount):
                yield
            return
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


class SharedBudget:
    """A number of bytes that processes take for a while, in units that a semaphore counts.

    What a process holds when it is killed is never returned. The loader of a killed worker raises an error, and each
    loader has a budget of its own.

    Args:
        size: bytes. A larger amount takes all of them.
        context: the one that starts the processes, to which the object is passed.

    Raises:
        OSError: the system provides no semaphores.
    """

    def __init__(self, size: int, context: BaseContext) -> None:
        self._unit = -(-size // MAX_UNITS)
        self._units = size // self._unit
        self._turn = context.Lock()
        self._free = context.Semaphore(self._units)

    @contextmanager
    def take(self, amount: int) -> Iterator[None]:
        """Hold `amount` bytes, rounded up to units, within the context; one request is served after the other."""
        units = min(-(-amount // self._unit), self._units)
        with self._turn:  # or two requests could wait for what the other has of its units
            for _ in range(units):
                self._free.acquire()
        try:
            yield
        finally:
            for _ in range(units):
                self._free.release()


SIZE = 2 * MOST_PER_PIXEL * TrainConfig.max_pixels
"""Two of the largest images at once, or two dozen of a phone's photos."""
budget = DecodeBudget(SIZE)
"""Of this process, or, in a worker of a loader, of all of its workers."""


if hasattr(os, "register_at_fork"):  # in a forked process nobody decodes yet
    os.register_at_fork(after_in_child=budget.renew)
