"""README.md: its tables name all that there is, and nothing else."""

import dataclasses
import re
from pathlib import Path

from utils.config import TrainConfig

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def section(title: str) -> str:
    (found,) = re.findall(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", README, flags=re.M | re.S)
    return found


def test_every_file_is_in_the_table_of_files():
    told = set(re.findall(r"`([\w/]+\.(?:py|html|md))`", section("What the files are")))
    code = [*ROOT.glob("*.py"), *(path for folder in ("nets", "utils") for path in (ROOT / folder).iterdir())]
    there = {path.relative_to(ROOT).as_posix() for path in code if path.suffix in (".py", ".html", ".md")}
    assert told == there - {"nets/__init__.py"}


def test_every_field_is_in_the_table_of_settings():
    first_cells = re.findall(r"^\| (`.*?) \|", section("Settings").partition("Where to begin")[0], flags=re.M)
    told = [name for cell in first_cells for name in re.findall(r"`(\w+)`", cell)]
    assert sorted(told) == sorted(set(told)), "a field stands twice"
    fields = {field.name for field in dataclasses.fields(TrainConfig)}
    assert set(told) == fields
