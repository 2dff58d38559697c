"""Writes the tables in docs/settings.md from `TrainConfig`: `python -m utils.config.settings_table`."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
from itertools import pairwise
from pathlib import Path

from utils.config.train_config import SETTINGS, TrainConfig

PAGE = Path(__file__).resolve().parents[2] / "docs/settings.md"
BEGIN, END = "<!-- settings: begin -->", "<!-- settings: end -->"


def make_tables() -> str:
    """One table for each group of fields, in the order of the class."""
    source = inspect.getsource(TrainConfig)
    headings = [(match.start(), match[1]) for match in re.finditer(r"^    # (.+)$", source, flags=re.M)]
    meanings = _docstrings(source)
    lines: list[str] = []
    for field in dataclasses.fields(TrainConfig):
        position = re.search(rf"^    {field.name}: ", source, flags=re.M).start()
        while headings and headings[0][0] < position:
            lines += ["", f"## {headings.pop(0)[1]}", "", "| field | default | meaning |", "|---|---|---|"]
        lines.append(_row(field, meanings[field.name]))
    return "\n".join(lines).strip() + "\n"


def _row(field: dataclasses.Field, meaning: str) -> str:
    spec = SETTINGS[field.name]
    marks = "".join(mark for mark, has in (("ᴿ", spec.by_recipe), ("ᶜ", spec.resumable)) if has)
    default = f'`"{spec.plain}"`' if isinstance(spec.plain, str) else f"`{spec.plain}`"
    limits = f" {spec.valid.remedy[0].upper()}{spec.valid.remedy[1:]}." if spec.valid else ""
    return f"| `{field.name}` {marks} | {default} | {meaning}{limits} |".replace("  |", " |")


def _docstrings(source: str) -> dict[str, str]:
    """The docstring of each field, on one line."""
    body = ast.parse(source).body[0].body
    return {
        node.target.id: re.sub(r"\s+", " ", after.value.value).replace("|", "\\|").strip()
        for node, after in pairwise(body)
        if isinstance(node, ast.AnnAssign) and isinstance(after, ast.Expr)
    }


def insert(page: str) -> str:
    """Insert the tables between the markers of a page."""
    before, rest = page.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n\n{make_tables()}\n{END}{after}"


if __name__ == "__main__":
    PAGE.write_text(insert(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    print(f"wrote {PAGE}")
