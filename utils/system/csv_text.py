"""Rows of CSV with text from untrusted sources."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence

from utils.system.text import printable

FORMULA = ("=", "+", "-", "@", "\t", "\r", "'")
"""A spreadsheet may run a cell that starts with one of these, see OWASP, "CSV Injection". The apostrophe is among them,
so that removing one from each cell that has it gives the text back."""


def csv_row(cells: Sequence[str | int | float]) -> str:
    """A row without line end. Control characters in text are escaped; text that a spreadsheet would take for a formula
    gets an apostrophe before it."""
    file = io.StringIO()
    csv.writer(file, lineterminator="").writerow([_plain(cell) if isinstance(cell, str) else cell for cell in cells])
    return file.getvalue()


def _plain(text: str) -> str:
    if text.startswith(FORMULA) and not _is_number(text):
        text = f"'{text}"
    return printable(text)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
