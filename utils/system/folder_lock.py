"""A lock that allows one process to write to a run's folder.

The filelock library would replace only `_lock`: it doesn't report who holds a lock, and doesn't refuse hard links or a
file of the user's.
"""

from __future__ import annotations

import errno
import os
import re
import socket
import stat
import tempfile
from contextlib import suppress
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
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)
"""What file systems without locks answer: some NFS, Lustre, FUSE and SMB mounts."""
HELD_FILE = "in_use.lock"
"""On a file system without locks, this file is the lock."""


class InUse(ValueError):
    """Another process is using the folder."""


class FolderLock:
    """An exclusive lock on `folder` until `release` or the end of the process.

    It is a POSIX record lock, which child processes don't inherit: after a kill it is free even while DataLoader
    workers are still alive. Where the file system has no locks, `HELD_FILE` exists while the folder is locked; after a
    kill it is left behind, and is ignored on the same computer.

    Raises:
        InUse: another process holds it.
        OSError: the lock file can't be opened, is a link, or is the user's file.
    """

    def __init__(self, folder: Path) -> None:
        path = folder / LOCK_FILE
        self._path = path
        self._held: Path | None = None
        self._text = _describe_holder()
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
        try:
            self._acquire(path)
        except BaseException:
            self.release()
            raise

    def _acquire(self, path: Path) -> None:
        status = os.fstat(self._file)
        if not stat.S_ISREG(status.st_mode) or status.st_nlink > 1:
            raise OSError(errno.EINVAL, "it is a link to another file", str(path))
        try:
            _lock(self._file)
        except OSError as error:
            if error.errno in NO_LOCKS:
                self._held = _hold(path.with_name(HELD_FILE), error)
            elif error.errno in (errno.EACCES, errno.EAGAIN, errno.EDEADLK):
                holder = os.read(self._file, 200).decode(errors="replace").strip()
                raise InUse(_in_use(path.parent, holder)) from error
            else:
                raise
        if status.st_size and os.read(self._file, len(PREFIX)) != PREFIX:
            raise OSError(errno.EEXIST, "it isn't a lock file of Thaw", str(path))
        os.lseek(self._file, 0, os.SEEK_SET)
        os.ftruncate(self._file, 0)
        os.write(self._file, self._text)

    def check(self) -> None:
        """Raise InUse unless this process still has the folder: while its machine was cut off, a file system on the
        network may have given the lock to another process, such as that of a restarted run."""
        # Opening the file again, and closing it, would release a POSIX lock.
        os.lseek(self._file, 0, os.SEEK_SET)
        same_file = self._path.is_file() and os.path.samestat(self._path.stat(), os.fstat(self._file))
        if not same_file or os.read(self._file, len(self._text) + 1) != self._text:
            raise InUse(f"{self._path.parent} was taken over by another process: this one ends without writing to it")

    def release(self) -> None:
        """Release the lock."""
        os.close(self._file)
        if self._held:
            self._held.unlink(missing_ok=True)


def supports_locks(folder: Path) -> bool:
    """Whether the file system of `folder` has locks."""
    if os.name == "nt":
        return True
    with tempfile.TemporaryFile(dir=folder) as file:
        try:
            _lock(file.fileno())
        except OSError as error:
            return error.errno not in NO_LOCKS
    return True


def _describe_holder() -> bytes:
    """This process, as a line."""
    return PREFIX + f"{os.getpid()} on {socket.gethostname()} since {datetime.now():%F %T}\n".encode()


def _in_use(folder: Path, holder: str) -> str:
    holder = holder or "another process"
    return f"{folder} is in use by {holder}; wait for it, stop it, or start a new run with resume=no"


def _hold(path: Path, reason: OSError) -> Path | None:
    """Create the lock file `path` and return it; None if the file system can't do that either. A warning is printed.

    Raises:
        InUse: a process holds it.
    """
    if path.exists():
        holder = path.read_text(errors="replace").strip()
        if not _is_gone(holder):
            raise InUse(f"{_in_use(path.parent, holder)}; if that process was killed, delete {path}")
        path.unlink(missing_ok=True)
    try:
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    except FileExistsError as error:  # another process was faster
        raise InUse(_in_use(path.parent, "")) from error
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        print(f"warning: {path.parent} can't be locked ({reason.strerror}): start only one run in it at a time")
        return None
    with suppress(OSError):
        os.write(file, _describe_holder())
    os.close(file)
    print(f"warning: the file system of {path.parent} has no locks ({reason.strerror}): {path.name} takes their place")
    return path


def _is_gone(holder: str) -> bool:
    """Whether the process that wrote this line was one of this computer that has ended. A process with the number of
    this one has: in a container, numbers come again."""
    found = re.match(rf"{PREFIX.decode()}(\d+) on (\S+) since ", holder)
    if not found or found[2] != socket.gethostname():
        return False
    try:
        os.kill(int(found[1]), 0)
    except ProcessLookupError:
        return True
    except OSError:
        pass
    return int(found[1]) == os.getpid()


def _lock(descriptor: int) -> None:
    if os.name == "nt":
        os.lseek(descriptor, LOCKED_BYTE, os.SEEK_SET)
        try:
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        finally:
            os.lseek(descriptor, 0, os.SEEK_SET)
    else:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
