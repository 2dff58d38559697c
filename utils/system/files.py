"""Files written whole or not at all, and the room that there is for them."""

from __future__ import annotations

import errno
import json
import os
import secrets
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

PARTIAL = ".partial"
"""Suffix of files that aren't whole yet. One that nobody writes to was left by a killed process and can go."""
PAUSES = (0.1, 0.2, 0.5, 1, 2, 4)
"""Seconds between attempts to rename."""


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
            _sync(file.fileno())
        _replace(unfinished, path)
    finally:
        with suppress(PermissionError):  # on Windows, where another program looks at it: it would hide the cause
            unfinished.unlink(missing_ok=True)
    sync_folder(path.parent)


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file whole. A link of that name is replaced, not followed."""
    with write_whole(path) as file:
        file.write(content)


def write_text(path: Path, text: str) -> None:
    """Likewise, in UTF-8; bytes of file names that are none as escapes."""
    write_bytes(path, text.encode("utf-8", "backslashreplace"))


def write_json(path: Path, content: Any) -> None:
    """Write a file of JSON whole, in which a number that isn't finite is an error: JSON has none."""
    write_text(path, json.dumps(content, indent=2, allow_nan=False) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """The dictionary that a file of JSON holds; an empty one if it can't be read as that."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def try_unlink(path: Path, consequence: str) -> None:
    """Delete a file; if that can't be, as of one that another program has open on Windows, say so and what follows."""
    try:
        path.unlink()
    except OSError as error:
        print(f"warning: {path} can't be deleted ({error.strerror}); {consequence}")


def _replace(source: Path, target: Path) -> None:
    """Rename; on Windows, where a program that reads `target` or looks for viruses in `source` is in the way, in
    several attempts."""
    for pause in PAUSES if os.name == "nt" else ():
        try:
            return os.replace(source, target)
        except PermissionError:
            time.sleep(pause)
    return os.replace(source, target)


def _sync(descriptor: int) -> None:
    """Flush a file to the disk; on macOS that takes more than `fsync`, after which the drive may still hold it back."""
    if sys.platform == "darwin":
        import fcntl

        with suppress(OSError):  # not every file system knows it
            fcntl.fcntl(descriptor, fcntl.F_FULLFSYNC)
            return
    os.fsync(descriptor)


def sync_folder(folder: Path) -> None:
    """Flush the names in `folder` to the disk, where the system can; Windows does so by itself."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some mounts can't, as VirtualBox's shared folders
                raise
        finally:
            os.close(descriptor)


def free_bytes(folder: Path) -> int:
    """Bytes that are free on the disk of `folder`."""
    return shutil.disk_usage(folder).free


def format_bytes(size: int) -> str:
    """A size in bytes for people."""
    return f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e6:.2f} MB"
