"""utils/system/files.py: atomic writes."""

import errno
import os
import stat
from contextlib import nullcontext
from pathlib import Path

import pytest

from utils.system import files
from utils.system.files import (
    PARTIAL,
    WriteError,
    make_folder,
    make_writable,
    remove_abandoned,
    write_text,
    write_whole,
)


def test_a_failed_write_leaves_the_old_file_and_nothing_else(here):
    Path("a").write_text("old")
    with pytest.raises(KeyboardInterrupt), write_whole(Path("a")) as file:
        file.write(b"half")
        raise KeyboardInterrupt
    assert os.listdir() == ["a"]
    assert Path("a").read_text() == "old"


@pytest.mark.parametrize(
    ("number", "remedy"), [(errno.ENOSPC, "free some space"), (errno.EROFS, "make its folder writable")]
)
@pytest.mark.parametrize("hidden", [False, True])
def test_what_cannot_be_written_is_named_with_cause_and_remedy(here, monkeypatch, number, remedy, hidden):
    def fail(_):
        try:
            raise OSError(number, os.strerror(number))
        finally:
            if hidden:  # as torch's writer does
                raise RuntimeError("unexpected pos 64 vs 0")

    monkeypatch.setattr(files, "_sync", fail)
    with pytest.raises(WriteError) as caught:
        write_text(Path("a"), "x")
    assert str(caught.value) == f"a can't be written ({os.strerror(number)}); {remedy}, or choose another place"
    assert (caught.value.errno, os.listdir()) == (number, [])


def test_other_errors_while_a_file_is_written_stay_as_they_are(here):
    for error in (FileNotFoundError(2, "No such file", "b"), RuntimeError("x"), OSError("of a library")):
        with pytest.raises(type(error)) as caught, write_whole(Path("a")):
            raise error
        assert caught.value is error


def test_a_folder_that_cannot_be_created(here):
    Path("file").touch()
    with pytest.raises(WriteError, match=r"^file/a/b can't be written \(Not a directory\); make its folder writable"):
        make_folder("file/a/b")
    with pytest.raises(OSError, match=r"^nothing can be written to file/a \(Not a directory\): give another"):
        make_writable(Path("file/a"), "--out")


def test_the_old_file_is_replaced_at_the_end(here):
    Path("a").write_text("old")
    with write_whole(Path("a")) as file:
        file.write(b"new")
        file.flush()
        assert Path("a").read_text() == "old"
        assert [name for name in os.listdir() if name.endswith(PARTIAL)]
    assert Path("a").read_text() == "new"
    assert os.listdir() == ["a"]


def test_file_rename_and_folder_are_flushed_in_order(here, monkeypatch):
    order = []
    fsync, replace = os.fsync, os.replace
    kinds = {0o100000: "file", 0o040000: "folder"}
    monkeypatch.setattr(os, "fsync", lambda fd: (order.append(kinds[os.fstat(fd).st_mode & 0o170000]), fsync(fd)))
    monkeypatch.setattr(os, "replace", lambda a, b: (order.append("rename"), replace(a, b)))
    with write_whole(Path("a")) as file:
        file.write(b"x")
    assert order == ["file", "rename", "folder"]


def test_rename_is_retried_on_windows(here, monkeypatch):
    class Windows:
        name = "nt"
        attempts = 0

        def replace(self, source, target):
            self.attempts += 1
            if self.attempts < 3:
                raise PermissionError(13, "Access is denied")
            os.replace(source, target)

    monkeypatch.setattr(files, "PAUSES", (0.0, 0.0))
    Path("new").write_text("new")
    monkeypatch.setattr(files, "os", Windows())
    files._replace(Path("new"), Path("a"))
    assert Path("a").read_text() == "new"
    files.os.attempts = -9
    with pytest.raises(PermissionError):
        files._replace(Path("a"), Path("b"))
    assert files.os.attempts == -6


def test_permissions_follow_the_umask(here):
    before = os.umask(0o022)
    try:
        with write_whole(Path("a")) as file:
            file.write(b"x")
    finally:
        os.umask(before)
    assert os.stat("a").st_mode & 0o777 == 0o644


@pytest.mark.parametrize(("number", "written"), [(errno.EINVAL, True), (errno.ENOTSUP, True), (errno.EIO, False)])
def test_mounts_that_do_not_support_flushing_a_folder(here, monkeypatch, number, written):
    fsync = os.fsync

    def refuse(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(number, "refused")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", refuse)
    with nullcontext() if written else pytest.raises(OSError, match="refused"):
        files.write_text(here / "a.txt", "a")
    assert (here / "a.txt").read_text() == "a"


def test_only_own_abandoned_partial_files_are_deleted(here):
    own, recent = Path("a.onnx.0123abcd.partial"), Path("a.onnx.abcdef01.partial")
    others = [
        Path(name) for name in ("a.onnx.partial", "film.mp4.partial", "b.onnx.0123abcd.partial", "a.onnx.x.partial")
    ]
    for path in (own, recent, *others):
        path.touch()
    for path in (own, *others):
        os.utime(path, (1, 1))
    remove_abandoned(here, "a.onnx")
    assert sorted(here.iterdir()) == sorted(path.absolute() for path in (recent, *others))
