"""Tests of utils/system/text.py."""

import pytest

from utils.system.text import count_of, display_width, format_table


@pytest.mark.parametrize(
    ("number", "noun", "text"),
    [(0, "image", "0 images"), (1, "image", "1 image"), (2, "class", "2 classes"), (1234, "file", "1,234 files")],
)
def test_counts(number, noun, text):
    assert count_of(number, noun) == text


def test_tables_are_aligned_by_columns_of_the_terminal():
    table = format_table([("class", "images"), ("猫", "7"), ("été", "1,234")], right=("images",))
    lines = table.splitlines()
    assert len({display_width(line) for line in lines}) == 1
    assert lines[1] == "猫          7"
