"""The license of pretrained weights, from the model card of their repository."""

from __future__ import annotations

import re
from pathlib import Path

import yaml

CARD = "README.md"
"""The model card in a repository of the Hugging Face hub. It starts with YAML between lines of three hyphens."""
UNKNOWN = "unknown: ask its author"
MAX_CARD, MAX_LENGTH = 65536, 80
"""Bytes of a card that are read, and characters of a license's name."""
OPEN = re.compile(r"(apache|mit|bsd|isc|cc0|cc-by-\d|cc-by-sa-\d|mpl|a?l?gpl|unlicense|zlib)\b[\w.+-]*$")
"""Licenses that allow commercial use and are widely known."""


def read_license(card: Path) -> str:
    """Return the license in a model card, with "gated" if access is granted on terms; empty if there is none."""
    try:
        with card.open("rb") as file:
            text = file.read(MAX_CARD).decode("utf-8", errors="replace").replace("\r\n", "\n")
    except OSError:
        return ""
    front = re.match(r"---\n(.*?\n)---", text, re.DOTALL)
    if not front:
        return ""
    try:
        values = yaml.safe_load(front[1])
    except (yaml.YAMLError, ValueError, RecursionError):
        return ""
    if not isinstance(values, dict):
        return ""
    names = _texts(values.get("license"))
    if names in ([], ["other"]):
        names = _texts(values.get("license_name")) or names
    if names and any(str(key).startswith("extra_gated_") for key in values):
        names.append("gated")
    return clean_license(", ".join(names))


def _texts(value: object) -> list[str]:
    """Return a text, or the texts in a list."""
    return [text for text in (value if isinstance(value, list) else [value]) if isinstance(text, str)]


def clean_license(text: object) -> str:
    """Return the name of a license without characters that could be more than a name; empty if it is unknown."""
    name = re.sub(r"[^a-z0-9 .,+-]", "", str(text or "").lower())[:MAX_LENGTH].strip()
    return "" if name in ("unknown", "none") else name


def warning_of(license: str) -> str:
    """Return what to know before using weights of this license; empty if it is unknown, or one of the `OPEN` ones."""
    if re.search(r"\bnc\b|non-?commercial|research", license):
        return "this license doesn't allow commercial use"
    if not license or all(map(OPEN.match, license.split(", "))):
        return ""
    return "this license has terms of its own: read them before using or sharing the weights"
