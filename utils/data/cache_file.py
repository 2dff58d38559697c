"""Cache files in `cache_dir`: naming by content, disk space check, and replacement of outdated files."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from utils.data.image_io import READERS
from utils.data.image_list import ImageList
from utils.system.digests import code_digest
from utils.system.files import format_bytes, free_bytes, remove_abandoned, write_whole

CHECKSUM = hashlib.sha256().digest_size
"""Bytes at the end of a cache file: the SHA-256 of what is before them."""
BLOCK = 1 << 20


def is_intact(path: Path, size: int | None = None) -> bool:
    """Whether `path` is a cache as it was written, of `size` bytes without its checksum. If it isn't, a warning says
    so, unless there is none."""
    if path.is_symlink() or not path.is_file():
        return False
    length = path.stat().st_size - CHECKSUM
    with path.open("rb") as file:
        if length >= 0 and size in (None, length) and _checksum(file, length) == file.read(CHECKSUM):
            return True
    print(f"warning: {path} isn't as it was written: it is made anew")
    return False


def _checksum(file: BinaryIO, length: int) -> bytes:
    """The checksum of the first `length` bytes of a file, which is then at their end."""
    checksum = hashlib.sha256()
    file.seek(0)
    while length > 0 and (block := file.read(min(length, BLOCK))):
        checksum.update(block)
        length -= len(block)
    return checksum.digest()


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
    """Open a file to which a checksum is added, and which is renamed to `path` when complete (see `write_whole`); then
    delete older ones.

    Older files are those in the same folder that match the glob `replaces`. Partial files of killed processes are
    deleted first.
    """
    remove_abandoned(path.parent, f"{path.name.partition('-')[0]}-*{path.suffix}")
    with write_whole(path) as file:
        yield file
        file.write(_checksum(file, file.tell()))
    for old in path.parent.glob(replaces):
        if old != path:
            with suppress(OSError):  # on Windows, another run may have it open
                old.unlink()
