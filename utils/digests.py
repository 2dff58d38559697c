"""Digests of what something was made from, so that what was made from something else isn't taken for it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from functools import cache
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[1]
PREPARING = ("augment", "data", "feature_cache", "image_cache", "images", "transforms", "views")
"""Modules of `utils` that make pictures and features of files."""
TRAINING = (*PREPARING, "average", "engine", "loss", "optim", "probe", "stages")
"""And those that decide what a training step does."""


def digest(parts: Iterable[str | bytes | memoryview]) -> str:
    """16 hexadecimal digits that change with any of `parts`."""
    found = hashlib.sha256()
    for part in parts:
        found.update(part.encode("utf-8", "surrogateescape") if isinstance(part, str) else part)
        found.update(b"\0")
    return found.hexdigest()[:16]


@cache
def code_digest(modules: tuple[str, ...]) -> str:
    """Changes with the code of `nets` and of these modules of `utils`, which people are to edit."""
    files = [*sorted(PROJECT.glob("nets/*.py")), *(PROJECT / "utils" / f"{module}.py" for module in modules)]
    return digest(file.read_bytes() for file in files)
