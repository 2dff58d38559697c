"""Tests of utils/system/text.py."""

import pytest

from utils.system.text import count_of


@pytest.mark.parametrize(
    ("number", "noun", "text"),
    [(0, "image", "0 images"), (1, "image", "1 image"), (2, "class", "2 classes"), (1234, "file", "1,234 files")],
)
def test_counts(number, noun, text):
    assert count_of(number, noun) == text
