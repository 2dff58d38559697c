"""Digests of what something was made from, so that what was made from something else isn't taken for it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from functools import cache
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[2]
IMAGE_CODE = ("utils/config", "utils/data", "utils/system")
"""The packages that decide which pixels are made of a file; see `code_digest`."""
TRAINING_CODE = (*IMAGE_CODE, "nets", "utils/metrics", "utils/modeling", "utils/training")
"""And those that decide what features are made of them, and what a training step does."""


def digest(parts: Iterable[str | bytes | memoryview]) -> str:
    """16 hexadecimal digits that change with any of `parts`."""
    found = hashlib.sha256()
    for part in parts:
        found.update(part.encode("utf-8", "surrogateescape") if isinstance(part, str) else part)
        found.update(b"\0")
    return found.hexdigest()[:16]


@cache
def code_digest(packages: tuple[str, ...]) -> str:
    """Changes with any module of these packages: their folder is the list, so that none is forgotten."""
    files = [file for package in packages for file in sorted(PROJECT.glob(f"{package}/**/*.py"))]
    return digest(part for file in files for part in (file.relative_to(PROJECT).as_posix(), file.read_bytes()))
