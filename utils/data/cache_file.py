"""Files in `cache_dir`: named after what is in them, said before they are made, one for each state of a list."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from utils.data.image_io import READERS
from utils.data.image_list import ImageList
from utils.system.digests import code_digest
from utils.system.files import PARTIAL, format_bytes, free_bytes, write_whole

STRAY_AFTER = 3600
"""Seconds without a write after which a half-made file was left by a process that is gone."""


def describe_files(images: ImageList, packages: tuple[str, ...]) -> Iterator[str]:
    """For `digest`: the paths of a list, size and time of each file, and the code that reads them: libraries and
    `packages`, see `code_digest`."""
    yield f"{READERS} {code_digest(packages)}"
    for i in range(len(images)):
        path = images.path(i)
        yield path
        try:
            status = os.stat(path)
            yield f"{status.st_size} {status.st_mtime_ns}"
        except OSError:
            yield "missing"


def check_room(size: int, folder: Path, remedy: str) -> None:
    """Raise a ValueError, with `remedy`, unless `folder` has room for a file of `size` bytes."""
    free = free_bytes(folder)
    if size > 0.95 * free:
        raise ValueError(
            f"cache_dir={str(folder)!r}: the cache takes about {format_bytes(size)} and {format_bytes(free)} are free; "
            f"set cache_dir to another disk, or {remedy}"
        )


@contextmanager
def replace_cache(path: Path, replaces: str) -> Iterator[BinaryIO]:
    """A file to write to, see `write_whole`. Once it has its name, the files of the folder that match the glob
    `replaces` go, and what a killed process left half-made has gone before."""
    for stray in path.parent.glob(f"*{PARTIAL}"):
        with suppress(OSError):  # another run may have given it its name meanwhile
            if time.time() - stray.stat().st_mtime > STRAY_AFTER:
                stray.unlink()
    with write_whole(path) as file:
        yield file
    for old in path.parent.glob(replaces):
        if old != path:
            with suppress(OSError):  # on Windows, another run may have it open
                old.unlink()
