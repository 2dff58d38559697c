"""Digests that detect when cached results or a resumed run come from different inputs or code."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from functools import cache
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[2]
IMAGE_CODE = ("utils/config", "utils/data", "utils/system")
"""The packages that decide how a file is decoded into pixels; see `code_digest`."""
TRAINING_CODE = (*IMAGE_CODE, "nets", "utils/metrics", "utils/modeling", "utils/training")
"""The packages that decide features and training steps."""


def digest(parts: Iterable[str | bytes | memoryview]) -> str:
    """16 hexadecimal digits that change with any of `parts`."""
    sha = hashlib.sha256()
    for part in parts:
        sha.update(part.encode("utf-8", "surrogateescape") if isinstance(part, str) else part)
        sha.update(b"\0")
    return sha.hexdigest()[:16]


@cache
def code_digest(packages: tuple[str, ...]) -> str:
    """Digest of the paths and contents of all modules in these packages."""
    files = [file for package in packages for file in sorted(PROJECT.glob(f"{package}/**/*.py"))]
    return digest(part for file in files for part in (file.relative_to(PROJECT).as_posix(), file.read_bytes()))
