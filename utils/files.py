"""Files written whole or not at all, and the room that there is for them."""

from __future__ import annotations

import hashlib
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

PARTIAL = ".partial"
"""Suffix of files that aren't whole yet. One that nobody writes to was left by a killed process and can go."""

BLOCK = 1 << 22
"""Bytes that are read at a time."""


@contextmanager
def write_whole(path: Path) -> Iterator[BinaryIO]:
    """A file to write to that gets its name once it is on the disk: what has that name is the old file or the new one,
    never a part of it, even if the power fails.

    Its bytes are flushed to the disk first, then it is renamed, then the folder's entry is flushed (Pillai et al., "All
    File Systems Are Not Created Equal", 2014, on why each is needed).

    Raises:
        OSError: it can't be written; what had the name before is untouched.
    """
    unfinished = path.with_name(f"{path.name}.{secrets.token_hex(4)}{PARTIAL}")
    try:
        with unfinished.open("x+b") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Flush the names in `folder` to the disk, where the system can; Windows does so by itself."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal digits."""
    found = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            found.update(block)
    return found.hexdigest()


def free_bytes(folder: Path) -> int:
    """Bytes that are free on the disk of `folder`."""
    return shutil.disk_usage(folder).free


def format_bytes(size: int) -> str:
    """A size in bytes for people."""
    return f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e6:.2f} MB"
