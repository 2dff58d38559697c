"""A lock that allows one process to write to a run's folder.

The filelock library would replace only `_lock`: it doesn't report who holds a lock, and doesn't refuse hard links or a
file of the user's.
"""

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
PREFIX = b"process "
LOCKED_BYTE = 1 << 20
"""Windows locks are mandatory, so the locked byte is beyond the text."""


class InUse(ValueError):
    """Another process is using the folder."""


class FolderLock:
    """An exclusive lock on `folder` until `release` or the end of the process.

    It is a POSIX record lock, which child processes don't inherit: after a kill it is free even while DataLoader
    workers are still alive.

    Raises:
        InUse: another process holds it.
        OSError: the lock file can't be opened, is a link, or is the user's file.
    """

    def __init__(self, folder: Path) -> None:
        path = folder / LOCK_FILE
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0))
        try:
            self._acquire(path)
        except BaseException:
            os.close(self._file)
            raise

    def _acquire(self, path: Path) -> None:
        status = os.fstat(self._file)
        if not stat.S_ISREG(status.st_mode) or status.st_nlink > 1:
            raise OSError(errno.EINVAL, "it is a link to another file", str(path))
        try:
            _lock(self._file)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN, errno.EDEADLK):
                raise
            holder = os.read(self._file, 200).decode(errors="replace").strip() or "another process"
            raise InUse(
                f"{path.parent} is in use by {holder}; wait for it, stop it, or start a new run with resume=no"
            ) from error
        if status.st_size and os.read(self._file, len(PREFIX)) != PREFIX:
            raise OSError(errno.EEXIST, "it isn't a lock file of Thaw", str(path))
        os.lseek(self._file, 0, os.SEEK_SET)
        os.ftruncate(self._file, 0)
        holder = f"{os.getpid()} on {socket.gethostname()} since {datetime.now():%F %T}\n"
        os.write(self._file, PREFIX + holder.encode())

    def release(self) -> None:
        """Release the lock."""
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
