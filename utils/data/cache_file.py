"""Cache files in `cache_dir`: naming by content, disk space check, and replacement of outdated files."""

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

STALE_AFTER = 3600
"""Seconds without a write after which a partial file is considered abandoned by a killed process."""


def describe_files(images: ImageList, packages: tuple[str, ...]) -> Iterator[str]:
    """Yield what a cache depends on: image libraries, code of `packages`, and path, size and time of each file."""
    yield f"{READERS} {code_digest(packages)}"
    for i in range(len(images)):
        path = images.path(i)
        yield path
        try:
            status = os.stat(path)
            yield f"{status.st_size} {status.st_mtime_ns}"
        except OSError:
            yield "missing"


def check_disk_space(size: int, folder: Path, remedy: str) -> None:
    """Raise a ValueError that suggests `remedy` unless `folder` has space for a file of `size` bytes."""
    free = free_bytes(folder)
    if size > 0.95 * free:
        raise ValueError(
            f"cache_dir={str(folder)!r}: the cache takes about {format_bytes(size)} and {format_bytes(free)} are free; "
            f"set cache_dir to another disk, or {remedy}"
        )


@contextmanager
def replace_cache(path: Path, replaces: str) -> Iterator[BinaryIO]:
    """Open a file that is renamed to `path` when complete (see `write_whole`), then delete older ones.

    Older files are those in the same folder that match the glob `replaces`. Partial files of killed processes are
    deleted first.
    """
    for partial in path.parent.glob(f"*{PARTIAL}"):
        with suppress(OSError):  # another run may have renamed it in the meantime
            if time.time() - partial.stat().st_mtime > STALE_AFTER:
                partial.unlink()
    with write_whole(path) as file:
        yield file
    for old in path.parent.glob(replaces):
        if old != path:
            with suppress(OSError):  # on Windows, another run may have it open
                old.unlink()
