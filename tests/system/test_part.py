"""Tests of utils/system/part.py."""

from pathlib import Path

import pytest

from utils.system.part import Part, find_parts


def test_parts_have_every_item_once():
    items = list(range(17))
    for count in (1, 2, 3, 17, 20):
        shares = [Part(number, count).of(items) for number in range(1, count + 1)]
        assert sorted(item for share in shares for item in share) == items
        assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_flag():
    assert Part.parse("3/16") == Part.parse(" 03/016 ") == Part(3, 16)
    assert str(Part(3, 16)) == "3/16"


@pytest.mark.parametrize(
    "text", ["", "3", "3/", "0/3", "4/3", "-1/3", "1.0/3", "1/0", "1/2/3", "x/3", f"1/{10**30}", "١/٣"]
)
def test_no_part(text):
    with pytest.raises(ValueError, match=r"^part='.*; give"):
        Part.parse(text)


def test_files_of_parts_are_found_in_order(tmp_path):
    path = tmp_path / "all.csv"
    parts = [Part(number, 12) for number in (10, 2, 1)] + [Part(1, 3)]
    for part in parts:
        part.place(path).touch()
    for name in ("all.csv", "all-0-of-12.csv", "all-1-of-.csv", "all-3-of-12.csv.partial", "other-1-of-3.csv"):
        (tmp_path / name).touch()
    (tmp_path / "all-2-of-3.csv").symlink_to(tmp_path / "other-1-of-3.csv")
    (tmp_path / "all-3-of-3.csv").mkdir()
    assert list(find_parts(path).items()) == [(part, part.place(path)) for part in sorted(parts)]
    assert find_parts(Path("missing/all.csv")) == {}
