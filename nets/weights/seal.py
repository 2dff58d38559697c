"""Seal a file of `torch.save`: append a note and the SHA-256 of all bytes before it."""

from __future__ import annotations

import hashlib
import json
import os
import zipfile
from pathlib import Path
from typing import Any, BinaryIO

MARK = b" sha256:"
DIGITS = 64
"""Hexadecimal digits of a SHA-256."""
BLOCK = 1 << 22


def seal(file: BinaryIO, note: dict[str, Any]) -> None:
    """Append `note` (as JSON) and the SHA-256 of all bytes before it to `file`, which `torch.save` just wrote.

    Both are stored as the zip archive's comment, so other programs can still open the file. `file` is open for reading
    and writing, positioned at its end.
    """
    text = json.dumps(note).encode() + MARK
    file.seek(-2, os.SEEK_END)  # the length of the comment, 0 so far
    file.write((len(text) + DIGITS).to_bytes(2, "little") + text)
    file.write(_sha256(file, file.tell()))


def verify_checksum(path: Path) -> None:
    """Raise a ValueError if a file is not sealed or its checksum doesn't match, so damage is found before loading."""
    with path.open("rb") as file:
        body, mark, digest = _parts(file)
        if mark != MARK:
            raise ValueError(f"{path} is damaged: it has no checksum at its end, so it was cut off or changed")
        if _sha256(file, body) != digest:
            raise ValueError(f"{path} is damaged: its checksum doesn't match")


def has_checksum(path: Path) -> bool:
    """Return whether a file ends with a checksum, valid or not."""
    with path.open("rb") as file:
        return _parts(file)[1] == MARK


def read_note(path: Path) -> dict[str, Any] | None:
    """Return the note of a sealed file without verifying the checksum, or None."""
    if not path.is_file():
        return None
    try:
        with zipfile.ZipFile(path) as archive:
            text, mark, _ = archive.comment.rpartition(MARK)
        note = json.loads(text) if mark else None
    except (OSError, ValueError, RuntimeError, zipfile.BadZipFile):  # zipfile raises RuntimeError for unknown flags
        return None
    return note if isinstance(note, dict) else None


def digest_file(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal digits."""
    with path.open("rb") as file:
        return _sha256(file, path.stat().st_size).decode()


def _parts(file: BinaryIO) -> tuple[int, bytes, bytes]:
    """Return the number of bytes that the checksum covers, the bytes expected to be `MARK`, and the checksum."""
    body = max(0, file.seek(0, os.SEEK_END) - DIGITS)
    file.seek(max(0, body - len(MARK)))
    mark = file.read(min(len(MARK), body))
    return body, mark, file.read()


def _sha256(file: BinaryIO, size: int) -> bytes:
    """Return the digest of the first `size` bytes of `file`; leaves the position after them."""
    digest = hashlib.sha256()
    file.seek(0)
    while size > 0 and (block := file.read(min(BLOCK, size))):
        digest.update(block)
        size -= len(block)
    return digest.hexdigest().encode()
