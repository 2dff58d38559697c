"""utils/config/settings_table.py: docs/settings.md is what the class says."""

import dataclasses
import re

from utils.config.settings_table import PAGE, insert, make_tables
from utils.config.train_config import SETTINGS, TrainConfig


def test_the_page_is_up_to_date():
    page = PAGE.read_text(encoding="utf-8")
    assert insert(page) == page, "run python -m utils.config.settings_table"


def test_every_field_has_one_row_in_the_order_of_the_class():
    rows = re.findall(r"^\| `(\w+)`", make_tables(), flags=re.M)
    assert rows == [field.name for field in dataclasses.fields(TrainConfig)]


def test_rows_have_default_marks_and_limits():
    rows = {row.split("`")[1]: row for row in make_tables().splitlines() if row.startswith("| `")}
    assert rows["train_crop"].startswith("| `train_crop` ᴿ | `0.08` |")
    assert rows["train_crop"].endswith("Must be above 0 and at most 1. |")
    assert {name for name, row in rows.items() if "ᶜ" in row} == {
        name for name, known in SETTINGS.items() if known.resumable
    }
