"""Text for messages: counts, names, and text from untrusted sources made safe to print."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

DIRECTIONS = frozenset("\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
"""Invisible characters that change the direction of the surrounding text."""


def display_width(text: str) -> int:
    """The number of terminal columns of `text`: East Asian wide characters take two, combining ones none."""
    wide = sum(unicodedata.east_asian_width(char) in "WF" for char in text)
    return len(text) + wide - sum(unicodedata.combining(char) > 0 for char in text)


def format_table(rows: Sequence[Sequence[str]], right: Sequence[str] = ()) -> str:
    """A table whose first row is its header; columns whose header is in `right` are aligned right."""
    columns = []
    for header, *cells in zip(*([printable(cell) for cell in row] for row in rows), strict=True):
        width = max(map(display_width, (header, *cells)))
        gaps = [" " * (width - display_width(cell)) for cell in (header, *cells)]
        columns.append([g + c if header in right else c + g for g, c in zip(gaps, (header, *cells), strict=True)])
    return "\n".join("  ".join(row).rstrip() for row in zip(*columns, strict=True))


def shorten_list(names: Sequence[str], count: int = 5) -> str:
    """The first names, and how many more there are."""
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return (", ".join(names[:count]) or "none") + more


def printable(text: str, keep: str = "") -> str:
    """`text` with undecodable bytes of file names, control characters (except those in `keep`) and direction changes
    as escapes."""
    valid = text.encode("utf-8", "backslashreplace").decode("utf-8")
    unsafe = {char for char in valid if unicodedata.category(char) in ("Cc", "Zl", "Zp") or char in DIRECTIONS}
    escapes = {char: char.encode("unicode_escape").decode() for char in unsafe - set(keep)}
    return "".join(escapes.get(char, char) for char in valid)


def count_of(number: int, noun: str) -> str:
    """`number` and `noun`, in the plural unless the number is 1: "1 image", "2 images", "3 classes"."""
    plural = f"{noun}es" if noun.endswith("s") else f"{noun}s"
    return f"{number:,} {noun if number == 1 else plural}"
