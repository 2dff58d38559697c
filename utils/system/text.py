"""Text from anywhere, made fit to be shown."""

from __future__ import annotations

import unicodedata

DIRECTIONS = frozenset("\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
"""Signs that aren't seen and turn the direction of the text around them."""


def printable(text: str, keep: str = "") -> str:
    """`text` with escapes for what no font and no UTF-8 file can hold, bytes of a file name that aren't UTF-8, and for
    what would steer a terminal or turn the direction of writing, but for what is in `keep`."""
    shown = text.encode("utf-8", "backslashreplace").decode("utf-8")
    steers = {sign for sign in shown if unicodedata.category(sign) in ("Cc", "Zl", "Zp") or sign in DIRECTIONS}
    escapes = {sign: sign.encode("unicode_escape").decode() for sign in steers - set(keep)}
    return "".join(escapes.get(sign, sign) for sign in shown)
