"""The paths that predict.py reads."""

import io
import os

import pytest

from tests.conftest import write_image
from utils.inference.image_paths import ask_for_paths, expand, read_lines


def test_typed_paths_may_be_quoted_folders_and_globs(monkeypatch, trained):
    monkeypatch.setattr("sys.stdin", io.StringIO("'datasets/test/dark'\n\"datasets/test/*/00.png\"\n"))
    assert len(list(expand(ask_for_paths()))) == 6 + 2


def test_folders_globs_and_hidden_files(here):
    for name in ("a/1.png", "a/b/2.JPG", "a/.hidden.png", "a/notes.txt", "c/x.txt"):
        write_image(here / f"{name}.png").rename(here / name)
    assert list(expand(["a"])) == ["a/1.png", "a/b/2.JPG"]
    assert list(expand(["*"])) == ["a/1.png", "a/b/2.JPG", "c"]
    assert list(expand(["**/1.png"])) == ["a/1.png"]
    assert list(expand(["a/**"])) == ["a/1.png", "a/b/2.JPG"]
    assert list(expand(["**"])) == ["a/1.png", "a/b/2.JPG", "c"]
    assert list(expand(["c", "none*.png", "a/notes.txt"])) == ["c", "none*.png", "a/notes.txt"]


def test_brackets_in_names_are_part_of_a_glob_or_of_a_name(here):
    for name in ("trip [2024]/a.png", "trip [2024]/b[1].png", "trip 2/c.png"):
        write_image(here / name)
    both = ["trip [2024]/a.png", "trip [2024]/b[1].png"]
    assert list(expand(["trip [2024]/*.png"])) == both
    assert list(expand([f"{here}/trip [2024]/*.png"])) == [f"{here}/{name}" for name in both]
    assert list(expand(["trip [2024]/[ac]*.png"])) == both[:1]
    assert list(expand(["trip [2024]/*[1].png"])) == both[1:]
    assert list(expand(["trip [0-9]/*.png"])) == ["trip 2/c.png"]


def test_a_subfolder_that_cannot_be_opened_is_skipped(here, monkeypatch, capsys):
    """`os.scandir` is patched, since the user of the tests may have permission to open any folder."""
    for name in ("a/1.png", "a/b/2.png", "c/3.png"):
        write_image(here / name)
    scandir = os.scandir

    def refuse(path):
        if path in (os.path.join("a", "b"), "c"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr("os.scandir", refuse)
    assert list(expand(["a"])) == ["a/1.png"]
    assert "skipped in a: 1 a folder that can't be opened" in capsys.readouterr().err
    assert list(expand(["c"])) == ["c"]  # reading it then fails
    assert "skipped in c: 1 a folder that can't be opened" in capsys.readouterr().err


def test_standard_input_that_is_not_utf_8_on_windows(monkeypatch):
    monkeypatch.setattr("os.fsdecode", lambda name: name.decode("utf-8", "surrogatepass"))
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO("ä.png\r\n".encode() + "Jürgen.png".encode("cp850"))))
    lines = read_lines()
    assert next(lines) == "ä.png"
    with pytest.raises(ValueError, match=r"standard input: b'J\\x81rgen\.png' isn't UTF-8; run chcp 65001 first"):
        next(lines)


def test_typed_paths_end_with_the_input(monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("a.jpg\nb.jpg"))
    assert list(ask_for_paths()) == ["a.jpg", "b.jpg"]
