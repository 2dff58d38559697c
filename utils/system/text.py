"""Text from untrusted sources, made safe to print."""

from __future__ import annotations

import unicodedata

DIRECTIONS = frozenset("\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
"""Invisible characters that change the direction of the surrounding text."""


def printable(text: str, keep: str = "") -> str:
    """`text` with undecodable bytes of file names, control characters (except those in `keep`) and direction changes
    as escapes."""
    valid = text.encode("utf-8", "backslashreplace").decode("utf-8")
    unsafe = {char for char in valid if unicodedata.category(char) in ("Cc", "Zl", "Zp") or char in DIRECTIONS}
    escapes = {char: char.encode("unicode_escape").decode() for char in unsafe - set(keep)}
    return "".join(escapes.get(char, char) for char in valid)
