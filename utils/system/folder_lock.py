"""One writer for a run's folder: a lock that dies with its process."""

from __future__ import annotations

import errno
import os
import socket
import stat
from datetime import datetime
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    import msvcrt

LOCK_FILE = "in_use_by.txt"
BEGINNING = b"process "
"""Of what it says."""
LOCKED_BYTE = 1 << 20
"""Where Windows locks, out of the way of what is to be read."""


class InUse(ValueError):
    """Another process writes to the folder; the message names it."""


class FolderLock:
    """The right to write to `folder`, until `release` or the end of the process, however that comes.

    It is the operating system's record lock: children don't inherit it, as they would that of `flock`, so that it ends
    with a killed process even if its workers live a moment longer.

    Raises:
        InUse: another process has it.
        OSError: the file can't be opened, or is somebody's own, which a link in a folder from elsewhere may lead to.
    """

    def __init__(self, folder: Path) -> None:
        path = folder / LOCK_FILE
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0))
        try:
            self._take(path)
        except BaseException:
            os.close(self._file)
            raise

    def _take(self, path: Path) -> None:
        status = os.fstat(self._file)
        if not stat.S_ISREG(status.st_mode) or status.st_nlink > 1:
            raise OSError(errno.EINVAL, "it leads to another file", str(path))
        try:
            _lock(self._file)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN, errno.EDEADLK):
                raise
            holder = os.read(self._file, 200).decode(errors="replace").strip() or "another process"
            raise InUse(
                f"{path.parent} is being written by {holder}: wait for it or stop it, or begin a run of its own with "
                f"resume=no"
            ) from error
        if status.st_size and os.read(self._file, len(BEGINNING)) != BEGINNING:
            raise OSError(errno.EEXIST, "it is a file of your own", str(path))
        os.lseek(self._file, 0, os.SEEK_SET)
        os.ftruncate(self._file, 0)
        holder = f"{os.getpid()} on {socket.gethostname()} since {datetime.now():%F %T}\n"
        os.write(self._file, BEGINNING + holder.encode())

    def release(self) -> None:
        """Give it back."""
        os.close(self._file)


def _lock(descriptor: int) -> None:
    if os.name == "nt":
        os.lseek(descriptor, LOCKED_BYTE, os.SEEK_SET)
        try:
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        finally:
            os.lseek(descriptor, 0, os.SEEK_SET)
    else:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
