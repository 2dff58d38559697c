"""Tests of utils/data/image_list.py."""

import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from utils.data.image_list import (
    cut,
    list_in_memory,
    read_classes,
    read_first_path,
    read_list,
    write_classes,
    write_list,
)

AWKWARD = ["a b.jpg", "a;b;c.jpg", "'q\".jpg", "猫/图片 1.jpg", "-.jpg", "#%,.png", "e\u0301.png", "\udcff.png", " "]
# File names: any bytes except those filtered below; bytes that aren't UTF-8 become surrogates.
names = st.binary(min_size=1, max_size=60).map(lambda b: b.decode("utf-8", "surrogateescape"))
usable_names = names.filter(lambda name: not set(name) & {"\n", "\r", "\0"} and not name.startswith("/"))


def test_awkward_names_round_trip(here):
    entries = list(enumerate(AWKWARD))
    write_list("list.txt", entries)
    images = read_list("list.txt", num_classes=len(AWKWARD))
    assert [(int(images.class_ids[i]), images.path(i)) for i in range(len(images))] == entries


@settings(deadline=None)  # a busy machine is no failure
@given(st.lists(st.tuples(st.integers(0, 999), usable_names), min_size=1, max_size=20))
def test_any_name_round_trips(tmp_path_factory, entries):
    path = tmp_path_factory.getbasetemp() / "property.txt"
    write_list(path, entries)
    images = read_list(path, num_classes=1000)
    expected = [(class_id, os.path.join(path.parent, name)) for class_id, name in entries]
    assert [(int(images.class_ids[i]), images.path(i)) for i in range(len(images))] == expected


@pytest.mark.parametrize("name", ["a\nb.jpg", "a\rb.jpg"])
def test_line_break_in_a_name_is_an_error(here, name):
    with pytest.raises(ValueError, match="line break"):
        write_list("list.txt", [(0, name)])
    assert not os.path.exists("list.txt")


def test_relative_paths_start_at_the_folder_of_the_list(here):
    os.mkdir("elsewhere")
    write_list("elsewhere/list.txt", [(0, "a.jpg"), (1, "/b.jpg")])
    images = read_list("elsewhere/list.txt", 2)
    assert [images.path(0), images.path(1)] == ["elsewhere/a.jpg", "/b.jpg"]


def test_windows_line_ends_and_byte_order_mark(here):
    (here / "list.txt").write_bytes(b"\xef\xbb\xbf0;a.jpg\r\n1;b.jpg\r\n\r\n")
    images = read_list("list.txt", 2)
    assert [images.path(0), images.path(1)] == ["a.jpg", "b.jpg"]


def test_list_in_memory_is_three_arrays():
    images = list_in_memory((0, f"{i}.jpg") for i in range(1000))
    assert all(isinstance(getattr(images, name), np.ndarray) for name in ("buffer", "starts", "class_ids"))
    assert (images.path(0), images.path(1), images.path(999)) == ("0.jpg", "1.jpg", "999.jpg")


def test_consecutive_rows_of_a_list():
    images = list_in_memory((i % 3, f"{i}.png") for i in range(10))
    for rows in (range(0), range(3), range(4, 10), range(10, 10)):
        part = cut(images, rows)
        assert [part.path(i) for i in range(len(part))] == [f"{i}.png" for i in rows]
        assert part.class_ids.tolist() == [i % 3 for i in rows]


def test_parsing_across_blocks(monkeypatch):
    monkeypatch.setattr("utils.data.image_list.BLOCK", 7)
    images = list_in_memory((i, "x" * (i % 5 + 1)) for i in range(50))
    assert [images.path(i) for i in range(50)] == ["x" * (i % 5 + 1) for i in range(50)]
    assert images.class_ids.tolist() == list(range(50))


BROKEN = ["a.jpg", "x;a.jpg", "-1;a.jpg", "1", "1;", "²;a.jpg", " 1;a.jpg", ";a.jpg", "1234567890;a", "/;a", ":;a"]


@pytest.mark.parametrize("line", BROKEN)
def test_invalid_line_is_reported_with_its_number(here, line):
    (here / "list.txt").write_text(f"0;a.jpg\n{line}\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"list\.txt, line 2: expected class_id;path, found"):
        read_list("list.txt", 2)


def test_class_id_out_of_range(here):
    (here / "list.txt").write_text("0;a.jpg\n2;b.jpg\n")
    with pytest.raises(ValueError, match=r"line 2: class id 2, but there are 2 classes"):
        read_list("list.txt", 2)


def test_missing_and_empty_list(here):
    with pytest.raises(FileNotFoundError, match=r"no list none\.txt: run python txt_annotation\.py"):
        read_list("none.txt", 2)
    (here / "empty.txt").touch()
    with pytest.raises(ValueError, match="empty"):
        read_list("empty.txt", 2)


def test_classes_round_trip(here):
    names = ["a b", "猫", "x;y", "\udcff"]
    write_classes("model_data/classes.txt", names)
    assert read_classes("model_data/classes.txt") == names


def test_spaces_around_class_names_are_removed(here):
    Path("c.txt").write_text("cat\ndog \n\tbird\n  \n", encoding="utf-8")
    assert read_classes("c.txt") == ["cat", "dog", "bird"]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be"])
def test_files_that_an_editor_saved_as_utf_16(here, encoding):
    mark = "" if encoding == "utf-16" else "\ufeff"
    Path("c.txt").write_text(f"{mark}cat\r\n猫\r\n", encoding=encoding, newline="")
    Path("list.txt").write_text(f"{mark}0;a.jpg\r\n1;猫.jpg\r\n", encoding=encoding, newline="")
    assert read_classes("c.txt") == ["cat", "猫"]
    images = read_list("list.txt", 2)
    assert [images.path(i) for i in range(2)] == ["a.jpg", "猫.jpg"]
    assert read_first_path("list.txt") == "a.jpg"
    for name in ("c.txt", "list.txt"):
        Path(name).write_bytes(Path(name).read_bytes()[:-1])
    for read in (read_classes, lambda path: read_list(path, 2)):
        with pytest.raises(ValueError, match=r"txt: damaged UTF-16; save it as UTF-8"):
            read("c.txt" if read is read_classes else "list.txt")


def test_class_file_with_nul_bytes(here):
    Path("c.txt").write_text("a\nb\n", encoding="utf-16-le")
    with pytest.raises(ValueError, match=r"c\.txt: NUL byte; the file is damaged or isn't UTF-8"):
        read_classes("c.txt")


@pytest.mark.parametrize("block", [4, 1 << 22])
@pytest.mark.parametrize("line", ["1;b.jpg ", "1; b.jpg", "1;b.jpg\t\r", "1;  b.jpg  "])
def test_spaces_that_an_editor_added_to_a_path(here, monkeypatch, line, block):
    monkeypatch.setattr("utils.data.image_list.BLOCK", block)
    Path("b.jpg").touch()
    Path("list.txt").write_bytes(f"0;a b.jpg\n{line}\n0;c.jpg".encode())
    with pytest.raises(ValueError, match=r"list\.txt, line 2: there is no image '.*', but there is one without"):
        read_list("list.txt", 2)
    Path(line.strip("\r")[2:]).touch()
    assert len(read_list("list.txt", 2)) == 3


@pytest.mark.parametrize(
    ("text", "message"), [("a\nb\na\n", "repeated class names: a"), ("a\n", "found 1"), ("", "found 0")]
)
def test_invalid_class_files(here, text, message):
    (here / "c.txt").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_classes("c.txt")


def test_missing_class_file(here):
    with pytest.raises(FileNotFoundError, match=r"no class file c\.txt"):
        read_classes("c.txt")


def test_read_first_path(here):
    write_list("list.txt", [(0, "a;b.jpg"), (1, "c.jpg")])
    assert read_first_path("list.txt") == "a;b.jpg"
    (here / "sub").mkdir()
    write_list("sub/list.txt", [(0, "a.jpg")])
    assert read_first_path("sub/list.txt") == read_list("sub/list.txt", 1).path(0) == "sub/a.jpg"
    (here / "empty.txt").touch()
    assert read_first_path("empty.txt") is read_first_path("none.txt") is None


def test_last_line_without_line_end(here):
    (here / "list.txt").write_bytes(b"0;a.jpg\n\n1;b.jpg")
    images = read_list("list.txt", 2)
    assert [images.path(i) for i in range(len(images))] == ["a.jpg", "b.jpg"]


def test_nul_byte_is_reported_with_its_line(here):
    Path("list.txt").write_bytes(b"0;a.jpg\n1;b\0c.jpg\n")
    with pytest.raises(ValueError, match=r"list\.txt, line 2: NUL byte"):
        read_list("list.txt", num_classes=2)
