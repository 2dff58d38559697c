"""Files that end with a checksum of all their bytes, and with a note."""

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
"""Bytes that are read at a time."""


def seal(file: BinaryIO, note: dict[str, Any]) -> None:
    """End `file`, which `torch.save` just wrote, with `note` and the SHA-256 of every byte before it.

    They become the comment that a zip archive may end with, so that the file stays what other programs can open.

    Args:
        file: open for reading and writing, at its end.
        note: what shall be known without opening the archive, as JSON.
    """
    text = json.dumps(note).encode() + MARK
    file.seek(-2, os.SEEK_END)  # the length of the comment, so far none
    file.write((len(text) + DIGITS).to_bytes(2, "little") + text)
    file.write(_sha256(file, file.tell()))


def check_seal(path: Path) -> None:
    """Read all of a sealed file.

    Raises:
        ValueError: it isn't as it was written.
    """
    with path.open("rb") as file:
        body, mark, digest = _parts(file)
        if mark != MARK:
            raise ValueError(f"{path} is damaged: it doesn't end with a checksum, so it was cut off or changed")
        if _sha256(file, body) != digest:
            raise ValueError(f"{path} is damaged: its checksum doesn't match")


def is_sealed(path: Path) -> bool:
    """Whether a file ends with a checksum, right or wrong."""
    with path.open("rb") as file:
        return _parts(file)[1] == MARK


def read_note(path: Path) -> dict[str, Any] | None:
    """The note of a sealed file, unchecked; None if it has none."""
    if not path.is_file():
        return None
    try:
        with zipfile.ZipFile(path) as archive:
            text, mark, _ = archive.comment.rpartition(MARK)
        note = json.loads(text) if mark else None
    except (OSError, ValueError, RuntimeError, zipfile.BadZipFile):  # a bit may say what zipfile doesn't know
        return None
    return note if isinstance(note, dict) else None


def digest_file(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal digits."""
    with path.open("rb") as file:
        return _sha256(file, path.stat().st_size).decode()


def _parts(file: BinaryIO) -> tuple[int, bytes, bytes]:
    """Length of what the checksum is of, the bytes where `MARK` should stand, and those of the checksum."""
    body = max(0, file.seek(0, os.SEEK_END) - DIGITS)
    file.seek(max(0, body - len(MARK)))
    mark = file.read(min(len(MARK), body))
    return body, mark, file.read()


def _sha256(file: BinaryIO, size: int) -> bytes:
    """The digest of the first `size` bytes of `file`, which is then behind them."""
    found = hashlib.sha256()
    file.seek(0)
    while size > 0 and (block := file.read(min(BLOCK, size))):
        found.update(block)
        size -= len(block)
    return found.hexdigest().encode()
