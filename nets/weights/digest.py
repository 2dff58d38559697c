"""The SHA-256 of files."""

from __future__ import annotations

import hashlib
from pathlib import Path

BLOCK = 1 << 22


def digest_file(path: Path) -> str:
    """The SHA-256 of a file in hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()
