"""Files in `cache_dir`: named after what is in them, written whole or not at all, said before they are made."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from utils.images import READERS
from utils.lists import ImageList

VERSION = 1
"""To be raised with any change of the code that gives other pictures or features from the same files and settings."""
STRAY_AFTER = 3600
"""Seconds without a write after which a half-made file was left by a process that is gone."""


def digest(parts: Iterable[str | bytes | memoryview]) -> str:
    """16 hexadecimal digits that change with any of `parts`."""
    found = hashlib.sha256()
    for part in parts:
        found.update(part.encode("utf-8", "surrogateescape") if isinstance(part, str) else part)
        found.update(b"\0")
    return found.hexdigest()[:16]


def describe_files(images: ImageList) -> Iterator[str]:
    """For `digest`: the paths of a list, size and time of each file, and what reads them."""
    yield f"{VERSION} {READERS}"
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
    free = shutil.disk_usage(folder).free
    if size > 0.95 * free:
        raise ValueError(
            f"cache_dir={str(folder)!r}: the cache takes about {gigabytes(size)} and {gigabytes(free)} are free; "
            f"set cache_dir to another disk, or {remedy}"
        )


@contextmanager
def write_whole(path: Path, replaces: str) -> Iterator[BinaryIO]:
    """A file to write to, which gets its name when it is on the disk: what has that name is whole.

    Then the files of the folder that match the glob `replaces` go, and so does what a killed process left half-made.
    """
    for stray in path.parent.glob("*.partial"):
        with suppress(OSError):  # another run may have given it its name meanwhile
            if time.time() - stray.stat().st_mtime > STRAY_AFTER:
                stray.unlink()
    with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".partial", delete=False) as file:
        try:
            yield file
            file.flush()
            os.fsync(file.fileno())
        except BaseException:
            file.close()
            os.unlink(file.name)
            raise
    os.replace(file.name, path)
    for old in path.parent.glob(replaces):
        if old != path:
            with suppress(OSError):  # on Windows, another run may have it open
                old.unlink()


def gigabytes(size: int) -> str:
    """A size in bytes for people."""
    return f"{size / 1e9:.2f} GB"
