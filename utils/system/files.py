"""Atomic writes, and free disk space."""

from __future__ import annotations

import errno
import json
import os
import re
import secrets
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

PARTIAL = ".partial"
"""Suffix of files that are being written. If no process writes to one, a killed process left it."""
TOKEN = 8
"""Hexadecimal digits before the suffix."""
STALE_AFTER = 3600
"""Seconds without a write after which a partial file is considered abandoned by a killed process."""
PAUSES = (0.1, 0.2, 0.5, 1, 2, 4)
"""Seconds between attempts to rename on Windows."""


class WriteError(OSError):
    """A file or folder can't be written, `filename`; `errno` and `strerror` are the cause."""

    def __str__(self) -> str:
        full = self.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        remedy = "free some space" if full else "make its folder writable"
        return f"{self.filename} can't be written ({self.strerror}); {remedy}, or choose another place"


def make_folder(folder: str | Path) -> None:
    """Create a folder and its parents, unless it exists.

    Raises:
        WriteError: it can't be created.
    """
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise WriteError(error.errno, error.strerror, str(folder)) from error


def refuse_link(folder: Path) -> None:
    """Raise a WriteError if `folder`, in the folder of a run, is a link: a run from somebody else may have one to any
    place, whose files would be replaced."""
    if folder.is_symlink():
        raise WriteError(errno.ELOOP, "it is a link to another folder", str(folder))


def make_writable(folder: Path, flag: str) -> Path:
    """Create the output folder given with `flag`, and check before any work that files can be written to it.

    Raises:
        OSError: the folder can't be created or written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise type(error)(f"nothing can be written to {folder} ({error.strerror}): give another with {flag}") from error
    return folder


@contextmanager
def write_whole(path: Path) -> Iterator[BinaryIO]:
    """A file that replaces `path` atomically at the end of the context: a reader sees the old file or the new one, even
    after a power failure.

    The data is flushed to disk, then the file is renamed, then the folder is flushed (Pillai et al., "All File Systems
    Are Not Created Equal", 2014, explains why each is needed).

    Raises:
        WriteError: it can't be written; `path` is unchanged.
    """
    unfinished = path.with_name(f"{path.name}.{secrets.token_hex(TOKEN // 2)}{PARTIAL}")
    try:
        with unfinished.open("x+b") as file:
            yield file
            file.flush()
            _sync(file.fileno())
        _replace(unfinished, path)
    except (OSError, RuntimeError) as error:
        cause = _os_error(error)
        if cause is None or cause.errno is None or cause.filename not in (None, str(unfinished)):
            raise
        raise WriteError(cause.errno, cause.strerror, str(path)) from error
    finally:
        with suppress(OSError):  # it doesn't exist, or the disk became read-only
            unfinished.unlink()
    _sync_folder(path.parent)


def copy_whole(source: Path, target: Path) -> None:
    """Replace `target` atomically by a copy of a file, see `write_whole`."""
    with write_whole(target) as copy, source.open("rb") as file:
        shutil.copyfileobj(file, copy)


def is_partial(path: Path) -> bool:
    """Whether `write_whole` has made a file, by its name. Other programs' partial files have other names."""
    return bool(re.fullmatch(rf".+\.[0-9a-f]{{{TOKEN}}}{re.escape(PARTIAL)}", path.name, re.DOTALL))


def remove_abandoned(folder: Path, name: str) -> None:
    """Delete the partial files that killed processes left of files whose names match the glob `name`."""
    for path in folder.glob(f"{name}.*{PARTIAL}"):
        with suppress(OSError):  # another process may have renamed it in the meantime
            if is_partial(path) and time.time() - path.lstat().st_mtime > STALE_AFTER:
                path.unlink()


def _os_error(error: BaseException | None) -> OSError | None:
    """The OSError behind `error`, which torch's writer replaces by an error of its own."""
    while error is not None and not isinstance(error, OSError):
        error = error.__context__
    return error


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file atomically. A link at `path` is replaced, not followed."""
    with write_whole(path) as file:
        file.write(content)


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 file atomically; undecodable bytes of file names become escapes."""
    write_bytes(path, text.encode("utf-8", "backslashreplace"))


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file atomically; numbers that aren't finite raise a ValueError."""
    write_text(path, json.dumps(content, indent=2, allow_nan=False) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """The dictionary in a JSON file; empty if it can't be read or holds something else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def try_unlink(path: Path, consequence: str) -> None:
    """Delete a file; if that fails, as on Windows while a program has it open, print a warning with `consequence`."""
    try:
        path.unlink()
    except OSError as error:
        print(f"warning: {path} can't be deleted ({error.strerror}); {consequence}")


def _replace(source: Path, target: Path) -> None:
    """Rename; on Windows with retries, since readers and virus scanners block it for a moment."""
    for pause in PAUSES if os.name == "nt" else ():
        try:
            return os.replace(source, target)
        except PermissionError:
            time.sleep(pause)
    return os.replace(source, target)


def _sync(descriptor: int) -> None:
    """Flush a file to disk; on macOS `fsync` leaves the data in the drive's cache."""
    if sys.platform == "darwin":
        import fcntl

        with suppress(OSError):  # unsupported by some file systems
            fcntl.fcntl(descriptor, fcntl.F_FULLFSYNC)
            return
    os.fsync(descriptor)


def _sync_folder(folder: Path) -> None:
    """Flush the directory entries of `folder` to disk, where the system supports it."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # unsupported by some mounts
                raise
        finally:
            os.close(descriptor)


def flush_to_disk(path: Path) -> None:
    """Flush a file or folder that is complete to disk."""
    if path.is_dir():
        _sync_folder(path)
        return
    with path.open("r+b") as file:
        _sync(file.fileno())


def free_bytes(folder: Path) -> int:
    """Free bytes on the disk of `folder`."""
    return shutil.disk_usage(folder).free


def format_bytes(size: int) -> str:
    """`size` in MB or GB."""
    return f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e6:.2f} MB"
