"""What is worth knowing of each image of a folder, read once and remembered."""

from __future__ import annotations

import hashlib
import io
import os
import sqlite3
import tempfile
from collections.abc import Sequence
from contextlib import closing
from dataclasses import astuple, dataclass, fields
from functools import partial
from pathlib import Path

import imagehash
import numpy as np
from PIL import Image

from utils.data.image_io import MAX_PIXELS, READERS, ImageError, open_image
from utils.system.thread_map import map_parallel

PREVIEW = 128
"""Longer side of the images on the audit's page."""
THUMBNAIL = 16
"""Side of the grey thumbnail in which two images are compared."""
FLAT = 8
"""Levels of 255 by which each colour of an image of one colour may vary."""
VERSION = 1
"""To be raised when fingerprints are taken in another way."""
SAVE_EVERY = 1000
"""Images between two writings of what was found, so that a run that is stopped goes on from there."""

PATIENCE = 60
"""Seconds to wait for another program that writes to the file."""


@dataclass(frozen=True)
class Fingerprint:
    """One image.

    Attributes:
        error: why it can't be read; then all that follows is empty.
        format: what it is, such as "JPEG", whatever its name says.
        width: of the upright image, in pixels.
        height: likewise.
        grey: whether it has no colour.
        flat: whether all of it is one colour, or nearly.
        digest: equal for two images of the same size with the same pixels, whatever their files are.
        phash: 64 bits; few of them differ where images look alike (Zauner, "Implementation and Benchmarking of
            Perceptual Image Hash Functions", 2010).
        thumbnail: grey levels (16, 16), as bytes.
    """

    error: str = ""
    format: str = ""
    width: int = 0
    height: int = 0
    grey: bool = False
    flat: bool = False
    digest: bytes = b""
    phash: bytes = b""
    thumbnail: bytes = b""


COLUMNS = ", ".join(field.name for field in fields(Fingerprint))
MARKS = ", ".join("?" * (2 + len(fields(Fingerprint))))
TABLE = f"CREATE TABLE IF NOT EXISTS fingerprints (path BLOB PRIMARY KEY, state TEXT, {COLUMNS})"
LOOK_UP = f"SELECT state, {COLUMNS} FROM fingerprints WHERE path = ?"
PREVIEWS = "CREATE TABLE IF NOT EXISTS previews (path BLOB PRIMARY KEY, state TEXT, jpeg BLOB)"


def take_fingerprint(path: str, max_pixels: int = MAX_PIXELS, allow_truncated: bool = False) -> Fingerprint:
    """Read an image; that it can't be read is told in the fingerprint."""
    try:
        image = open_image(path, max_pixels, allow_truncated)
    except ImageError as error:
        return Fingerprint(error=error.cause)
    pixels = np.asarray(image)
    digest = hashlib.blake2b(repr(image.size).encode(), digest_size=16)
    digest.update(np.ascontiguousarray(pixels))
    small = image.resize((64, 64), Image.Resampling.BOX).convert("L")
    return Fingerprint(
        format=image.format,
        width=image.width,
        height=image.height,
        grey=bool((pixels[..., 0] == pixels[..., 1]).all() and (pixels[..., 1] == pixels[..., 2]).all()),
        flat=max(high - low for low, high in image.getextrema()) <= FLAT,
        digest=digest.digest(),
        phash=np.packbits(imagehash.phash(small).hash).tobytes(),
        thumbnail=np.asarray(small.resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BOX)).tobytes(),
    )


class Fingerprints:
    """Fingerprints and small previews of images, kept in a file: only what is new or changed is read.

    Files that can't be read are few, and may be readable the next time, so they aren't remembered.

    Args:
        path: the file, an SQLite data base; a damaged one is made anew. If it can't be opened or written to, that is
            said, and nothing is remembered.
        max_pixels: as for `utils.data.image_io.open_image`.
        allow_truncated: likewise.
    """

    def __init__(self, path: str | Path, max_pixels: int = MAX_PIXELS, allow_truncated: bool = False) -> None:
        self.path = Path(path)
        self.limits = (max_pixels, allow_truncated)
        self.remembers = True
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._open()
        except (OSError, sqlite3.OperationalError) as error:  # nothing is wrong with the file
            self._forget(error)
            self._temporary = tempfile.TemporaryDirectory()  # which goes when this object does
            self.path = Path(self._temporary.name, self.path.name)
            self._prepare()

    def _open(self) -> None:
        try:
            self._prepare()
        except sqlite3.OperationalError:
            raise
        except sqlite3.DatabaseError:
            self.path.unlink()
            self._prepare()

    def _prepare(self) -> None:
        with closing(self._connect()) as db, db:
            (sound,) = db.execute("PRAGMA quick_check(1)").fetchone()
            if sound != "ok":
                raise sqlite3.DatabaseError(sound)
            db.execute(TABLE)
            db.execute(PREVIEWS)

    def _connect(self) -> sqlite3.Connection:
        return sqlite3.connect(self.path, timeout=PATIENCE)

    def read(self, paths: Sequence[str]) -> list[Fingerprint]:
        """The fingerprints of these images, in this order, with a progress bar while some must be read."""
        keys = [os.fsencode(os.path.abspath(path)) for path in paths]
        states = [self._state(path) for path in paths]
        with closing(self._connect()) as db:
            found = [
                Fingerprint(*row[1:]) if (row := db.execute(LOOK_UP, (key,)).fetchone()) and row[0] == state else None
                for key, state in zip(keys, states, strict=True)
            ]
            missing = [i for i, fingerprint in enumerate(found) if fingerprint is None]
            take = partial(take_fingerprint, max_pixels=self.limits[0], allow_truncated=self.limits[1])
            taken = map_parallel(take, [paths[i] for i in missing], "looking at images")
            rows = []
            for i, fingerprint in zip(missing, taken, strict=True):
                found[i] = fingerprint
                if not fingerprint.error:
                    rows.append((keys[i], states[i], *astuple(fingerprint)))
                if len(rows) == SAVE_EVERY or i == missing[-1]:
                    self._remember(db, f"INSERT OR REPLACE INTO fingerprints VALUES ({MARKS})", rows)
                    rows.clear()
        return found

    def preview(self, path: str) -> bytes | None:
        """A small JPEG of an image; None if it can't be read."""
        state = f"{PREVIEW} {self._state(path)}"
        with closing(self._connect()) as db:
            key = os.fsencode(os.path.abspath(path))
            row = db.execute("SELECT state, jpeg FROM previews WHERE path = ?", (key,)).fetchone()
            if row and row[0] == state:
                return row[1]
            try:
                image = open_image(path, *self.limits)
            except ImageError:
                return None
            image.thumbnail((PREVIEW, PREVIEW))
            buffer = io.BytesIO()
            image.save(buffer, "JPEG", quality=80)
            self._remember(db, "INSERT OR REPLACE INTO previews VALUES (?, ?, ?)", [(key, state, buffer.getvalue())])
            return buffer.getvalue()

    def _remember(self, db: sqlite3.Connection, statement: str, rows: Sequence[Sequence[object]]) -> None:
        if self.remembers:
            try:
                with db:
                    db.executemany(statement, rows)
            except sqlite3.OperationalError as error:  # locked, a disk that is full, or may only be read
                self._forget(error)

    def _forget(self, error: Exception) -> None:
        self.remembers = False
        print(f"warning: {self.path} can't be used ({error}): what is read of the images isn't remembered")

    def _state(self, path: str) -> str:
        """Changes when the file does, or what reads it, or what is asked of it."""
        try:
            status = os.stat(path)
        except OSError:
            return "missing"
        return f"{status.st_size} {status.st_mtime_ns} {self.limits} {READERS} {VERSION}"
