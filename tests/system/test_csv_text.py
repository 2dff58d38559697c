"""utils/system/csv_text.py"""

import csv

import pytest

from utils.system.csv_text import csv_row


@pytest.mark.parametrize("text", ["=1+1", "+x", "-x", "@x", "\tx", "\rx", "'x", "=cmd|' /C calc'!A0"])
def test_no_cell_is_a_formula(text):
    (row,) = csv.reader([csv_row([text, "y"])])
    assert row[0].startswith("'")
    assert row[0][1:].encode().decode("unicode_escape") == text


@pytest.mark.parametrize("text", ["a,b", 'say "x"', "été", "", "a\rb", "a\nb", "\x1b[31m", "a'b"])
def test_cells_stay_on_one_line(text):
    line = csv_row([text, 1, -2.5, "-0.25"])
    assert line.isprintable()
    (row,) = csv.reader([line])
    assert row[0].encode("latin-1", "backslashreplace").decode("unicode_escape") == text
    assert row[1:] == ["1", "-2.5", "-0.25"]
