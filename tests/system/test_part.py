"""Tests of utils/system/part.py."""

from pathlib import Path

import pytest

from utils.system.part import Part, check_facts, complete_parts, find_parts


def test_parts_have_every_item_once():
    items = list(range(17))
    for count in (1, 2, 3, 17, 20):
        shares = [Part(number, count).of(items) for number in range(1, count + 1)]
        assert sorted(item for share in shares for item in share) == items
        assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_rows_are_whole_batches_of_all_items():
    for items in (0, 1, 31, 32, 33, 1001):
        for count in (1, 2, 3, 7, 40):
            rows = [Part(number, count).rows(items, 32) for number in range(1, count + 1)]
            assert [row for part in rows for row in part] == list(range(items))
            assert all(part.start % 32 == 0 and (len(part) % 32 == 0 or part.stop == items) for part in rows if part)
            sizes = [-(-len(part) // 32) for part in rows]
            assert max(sizes) - min(sizes) <= 1


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


def test_all_parts_have_to_be_there(tmp_path):
    path = tmp_path / "all.csv"
    with pytest.raises(FileNotFoundError, match=r"no part of .*all\.csv; run the same command with --part 1/16"):
        complete_parts(path)
    (tmp_path / f"all-2-of-{10**9 - 1}.csv").touch()  # a number that nobody counts to
    with pytest.raises(FileNotFoundError, match=r"parts 1/9+, 3/9+, 4/9+, 5/9+, 6/9+ and 999999993 more of .* missing"):
        complete_parts(path)
    for number in (1, 2):
        Part(number, 2).place(path).touch()
    with pytest.raises(ValueError, match=r"has files of 2 and 999999999 parts of all\.csv; delete"):
        complete_parts(path)
    (tmp_path / f"all-2-of-{10**9 - 1}.csv").unlink()
    assert list(complete_parts(path)) == [Part(1, 2), Part(2, 2)]


def test_facts_are_the_same_by_value_and_type():
    check_facts({"a": 1, "b": "x", "more": []}, {"a": 1, "b": "x"})
    for theirs in (None, [], {}, {"a": 1}, {"a": True, "b": "x"}, {"a": 1.0, "b": "x"}, {"a": 1, "b": "y"}):
        with pytest.raises(ValueError, match="it "):
            check_facts(theirs, {"a": 1, "b": "x"})
