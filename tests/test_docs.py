"""README.md: its tables name all that there is, and nothing else."""

import dataclasses
import re
from pathlib import Path

from utils.config.train_config import TrainConfig

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def section(title: str) -> str:
    (found,) = re.findall(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", README, flags=re.M | re.S)
    return found


def test_every_script_and_package_is_in_the_table():
    told = set(re.findall(r"^\| (`.*?) \|", section("What the files are"), flags=re.M))
    packages = [path.parent for folder in ("nets", "utils") for path in (ROOT / folder).rglob("__init__.py")]
    there = {f"{path.relative_to(ROOT).as_posix()}/" for path in packages} - {"utils/"}
    there |= {path.name for path in ROOT.glob("*.py")}
    assert there <= {name for cell in told for name in re.findall(r"`([\w/.]+)`", cell)}


def test_every_field_is_in_the_table_of_settings():
    first_cells = re.findall(r"^\| (`.*?) \|", section("Settings").partition("Where to begin")[0], flags=re.M)
    told = [name for cell in first_cells for name in re.findall(r"`(\w+)`", cell)]
    assert sorted(told) == sorted(set(told)), "a field stands twice"
    fields = {field.name for field in dataclasses.fields(TrainConfig)}
    assert set(told) == fields
