"""Text for messages: counts, names, and text from untrusted sources made safe to print."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

DIRECTIONS = frozenset("\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
"""Invisible characters that change the direction of the surrounding text."""


def display_width(text: str) -> int:
    """Columns that `text` takes in a terminal: two for each wide (Chinese, Japanese, Korean) character."""
    return sum(map(_columns, text))


def _columns(character: str) -> int:
    if unicodedata.combining(character):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


def shorten(text: str, width: int, keep_end: bool = False) -> str:
    """`text` in at most `width` columns, with … in place of its end, or of its beginning with `keep_end`."""
    if display_width(text) <= width:
        return text
    kept, used = [], 1
    for character in reversed(text) if keep_end else text:
        used += _columns(character)
        if used > width:
            break
        kept.append(character)
    return "…" + "".join(reversed(kept)) if keep_end else "".join(kept) + "…"


def pad(text: str, width: int, right: bool = False) -> str:
    """`text` filled with spaces up to `width` columns, after it or, aligned right, before it."""
    spaces = " " * (width - display_width(text))
    return spaces + text if right else text + spaces


def format_table(rows: Sequence[Sequence[str]], right: Sequence[str] = ()) -> str:
    """A table whose first row is its header; columns whose header is in `right` are aligned right."""
    columns = []
    for header, *cells in zip(*([printable(cell) for cell in row] for row in rows), strict=True):
        width = max(map(display_width, (header, *cells)))
        columns.append([pad(cell, width, right=header in right) for cell in (header, *cells)])
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
