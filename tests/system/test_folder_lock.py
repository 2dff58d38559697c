"""utils/system/folder_lock.py: on file systems without locks. tests/runs/test_resume.py has the others."""

import errno
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from utils.system import folder_lock
from utils.system.folder_lock import HELD_FILE, LOCK_FILE, FolderLock, InUse, supports_locks


@pytest.fixture(params=[errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def no_locks(request, here, monkeypatch) -> int:
    def refuse(descriptor: int) -> None:
        raise OSError(request.param, os.strerror(request.param))

    monkeypatch.setattr(folder_lock, "_lock", refuse)
    return request.param


def test_a_file_takes_the_place_of_the_lock(no_locks, here, capsys):
    assert not supports_locks(here)
    lock = FolderLock(here)
    assert Path(HELD_FILE).read_text().startswith(f"process {os.getpid()} on {socket.gethostname()} since ")
    assert f"has no locks ({os.strerror(no_locks)}): {HELD_FILE} takes their place" in capsys.readouterr().out
    lock.release()
    assert not Path(HELD_FILE).exists()


def test_a_living_process_or_one_of_another_computer_holds_the_file(no_locks, here):
    for holder in (
        f"process {os.getppid()} on {socket.gethostname()} since now",
        "process 1 on node7 since now",
        "a note",
    ):
        Path(HELD_FILE).write_text(holder)
        with pytest.raises(InUse, match=rf"if that process was killed, delete .*{HELD_FILE}") as error:
            FolderLock(here)
        assert f"is in use by {holder};" in str(error.value)
        assert Path(HELD_FILE).read_text() == holder


def test_the_file_of_a_killed_process_of_this_computer_is_ignored(no_locks, here):
    ended = subprocess.Popen([sys.executable, "-S", "-c", ""])
    ended.wait()
    for pid in (ended.pid, os.getpid()):  # numbers come again in containers
        Path(HELD_FILE).write_text(f"process {pid} on {socket.gethostname()} since yesterday")
        FolderLock(here).release()


def test_without_exclusive_files_nothing_is_locked(no_locks, here, monkeypatch, capsys):
    open_file = os.open

    def refuse_exclusive(path, flags, *args, **kwargs):
        if flags & os.O_EXCL:
            raise OSError(errno.EOPNOTSUPP, "not supported")
        return open_file(path, flags, *args, **kwargs)

    monkeypatch.setattr(os, "open", refuse_exclusive)
    FolderLock(here).release()
    assert "can't be locked" in capsys.readouterr().out


def test_other_errors_are_raised(here, monkeypatch):
    monkeypatch.setattr(folder_lock, "_lock", lambda descriptor: (_ for _ in ()).throw(OSError(errno.EIO, "broken")))
    with pytest.raises(OSError, match="broken"):
        FolderLock(here)
    assert supports_locks(here)


@pytest.mark.skipif(os.name != "posix", reason="Windows has no such mode")
def test_the_lock_file_is_not_executable(here):
    FolderLock(here).release()
    assert not Path(LOCK_FILE).stat().st_mode & 0o111


def take_over(path: Path) -> None:
    path.write_text(f"process 1 on {socket.gethostname()} since now\n")


def replace_file(path: Path) -> None:
    text = path.read_text()
    path.unlink()
    path.write_text(text)


@pytest.mark.parametrize("change", [take_over, replace_file, Path.unlink])
def test_a_process_notices_that_its_folder_was_taken_over(here, change):
    lock = FolderLock(here)
    lock.check()
    change(here / LOCK_FILE)
    with pytest.raises(InUse, match="was taken over by another process"):
        lock.check()
    lock.release()


def test_checking_keeps_the_lock(here):
    lock = FolderLock(here)
    lock.check()
    program = (
        f"from pathlib import Path; from utils.system.folder_lock import FolderLock; FolderLock(Path({str(here)!r}))"
    )
    root = Path(folder_lock.__file__).parents[2]
    other = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, text=True, check=False)
    assert "InUse" in other.stderr
    lock.release()
