"""Image fingerprints for the audit, cached so that each image is read once."""

from __future__ import annotations

import hashlib
import io
import os
import sqlite3
import tempfile
from array import array
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import astuple, fields
from functools import partial
from pathlib import Path
from typing import get_type_hints

import imagehash
import numpy as np
from PIL import Image

from utils.annotation.fingerprint_table import THUMBNAIL, Fingerprint, FingerprintTable
from utils.data.image_io import FORMATS, MAX_PIXELS, READERS, ImageError, open_image
from utils.data.retry import read_patiently
from utils.system.files import try_unlink
from utils.system.folder_lock import supports_locks
from utils.system.part import Part, find_parts
from utils.system.text import count_of, printable
from utils.system.thread_map import map_parallel

PREVIEW = 128
"""Longer side of the images on the audit page."""
JPEG = b"\xff\xd8"
"""The first bytes of a preview."""
MAX_SIDE = 1 << 31
MAX_FLAT_RANGE = 8
"""Range of levels, of 255, within each channel of a blank image."""
VERSION = 2
"""Increase it when fingerprints are computed differently."""
SAVE_EVERY = 1000
"""Images between writes to the cache; an interrupted run resumes from the last write."""
MERGE_EVERY = 10_000
"""Images of a part between writes; others can read the cache in between."""
LOCK_TIMEOUT = 5
"""Seconds to wait while another process writes to the cache, which takes it a fraction of a second."""


COLUMNS = ", ".join(field.name for field in fields(Fingerprint))
INSERT = f"INSERT OR REPLACE INTO fingerprints VALUES ({', '.join('?' * (2 + len(fields(Fingerprint))))})"
TABLE = f"CREATE TABLE IF NOT EXISTS fingerprints (path BLOB PRIMARY KEY, state TEXT, {COLUMNS})"
SELECT = f"SELECT state, {COLUMNS} FROM fingerprints WHERE path = ?"
SELECT_ALL = f"SELECT path, state, {COLUMNS} FROM fingerprints"
SCHEMA = "SELECT type, name, sql FROM sqlite_master WHERE sql IS NOT NULL"
PREVIEWS = "CREATE TABLE IF NOT EXISTS previews (path BLOB PRIMARY KEY, state TEXT, jpeg BLOB)"
CREATED = {
    ("table", name, sql.replace("IF NOT EXISTS ", ""))
    for name, sql in (("fingerprints", TABLE), ("previews", PREVIEWS))
}
"""What `SCHEMA` gives for a database that was made here."""
TYPES = get_type_hints(Fingerprint)


def take_fingerprint(path: str, max_pixels: int = MAX_PIXELS, allow_truncated: bool = False) -> Fingerprint:
    """Read an image and compute its fingerprint."""
    image = open_image(path, max_pixels, allow_truncated)
    pixels = np.asarray(image)
    digest = hashlib.blake2b(repr(image.size).encode(), digest_size=16)
    digest.update(np.ascontiguousarray(pixels))
    small = image.resize((64, 64), Image.Resampling.BOX).convert("L")
    return Fingerprint(
        format=image.format,
        width=image.width,
        height=image.height,
        grey=bool((pixels[..., 0] == pixels[..., 1]).all() and (pixels[..., 1] == pixels[..., 2]).all()),
        flat=max(high - low for low, high in image.getextrema()) <= MAX_FLAT_RANGE,
        digest=digest.digest(),
        phash=np.packbits(imagehash.phash(small).hash).tobytes(),
        thumbnail=np.asarray(small.resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BOX)).tobytes(),
    )


def _from_row(values: Sequence[object]) -> Fingerprint | None:
    """The fingerprint in a row; None if a value isn't one that `take_fingerprint` could give, so that the image is read
    again."""
    typed = [int if kind is bool else kind for kind in TYPES.values()]
    if not all(type(value) is kind for value, kind in zip(values, typed, strict=True)):
        return None
    fingerprint = Fingerprint(*values)
    sizes = len(fingerprint.digest), len(fingerprint.phash), len(fingerprint.thumbnail)
    bounded = 0 < fingerprint.width < MAX_SIDE and 0 < fingerprint.height < MAX_SIDE
    known = fingerprint.format in FORMATS and not fingerprint.error
    return fingerprint if known and bounded and sizes == (16, 8, THUMBNAIL**2) else None


def _key(path: str) -> bytes:
    return os.fsencode(os.path.abspath(path))


def _check(db: sqlite3.Connection) -> None:
    """Raise a DatabaseError if a database is damaged, or wasn't made here."""
    if others := set(db.execute(SCHEMA)) - CREATED:  # such as views and triggers, which are code
        raise sqlite3.DatabaseError(f"it has other tables: {others!r:.100}")
    (status,) = db.execute("PRAGMA quick_check(1)").fetchone()
    if status != "ok":
        raise sqlite3.DatabaseError(status)


def _find(db: sqlite3.Connection, key: bytes, state: str) -> Fingerprint | None:
    """The fingerprint of an image in a database; None if it has none of this `state`."""
    row = db.execute(SELECT, (key,)).fetchone()
    return _from_row(row[1:]) if row and row[0] == state else None


class Fingerprints:
    """A cache of fingerprints and previews: only new and changed images are read.

    Unreadable images are not cached: they may be readable next time, for example after an out-of-memory error.

    Args:
        path: an SQLite database. A damaged one is recreated; if it can't be used, a warning is printed and nothing
            is cached.
        max_pixels: see `utils.data.image_io.open_image`.
        allow_truncated: see `utils.data.image_io.open_image`.
        part: write to a database beside `path`, for `merge_parts`: SQLite doesn't let several machines write to one.
            What `path` has is only read.

    Raises:
        ValueError: the database of a part can't be used.
    """

    def __init__(
        self,
        path: str | Path,
        max_pixels: int = MAX_PIXELS,
        allow_truncated: bool = False,
        part: Part | None = None,
    ) -> None:
        self.part = part
        self.merged = Path(path)
        self.path = part.place(self.merged) if part else self.merged
        self.limits = (max_pixels, allow_truncated)
        self.writable = self.locks = True
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.locks = supports_locks(self.path.parent)
            if not self.locks and not part:
                print(f"warning: the file system of {self.path} has no locks: run only one audit at a time")
            self._open()
        except (OSError, sqlite3.OperationalError) as error:  # the file itself isn't damaged
            self._disable(error)
            self._temporary = tempfile.TemporaryDirectory()  # deleted with this object
            self.path, self.locks = Path(self._temporary.name, self.path.name), True
            self._prepare()

    def _open(self) -> None:
        try:
            self._prepare()
        except sqlite3.OperationalError:
            raise
        except sqlite3.DatabaseError as error:
            print(f"warning: {printable(f'{self.path} is damaged ({error})')}: it is made anew")
            self.path.unlink()
            self._prepare()

    def _prepare(self) -> None:
        with closing(self._connect(self.path)) as db, db:
            _check(db)
            db.execute(TABLE)
            db.execute(PREVIEWS)

    def _connect(self, path: Path, mode: str = "rwc") -> sqlite3.Connection:
        # Without locks of the file system, SQLite would wait for the timeout and then fail.
        options = f"?mode={mode}" + ("" if self.locks else "&nolock=1")
        db = sqlite3.connect(path.absolute().as_uri() + options, timeout=LOCK_TIMEOUT, uri=True)
        db.text_factory = partial(str, encoding="utf-8", errors="replace")  # or invalid text would be an error
        return db

    def read(self, paths: Sequence[str]) -> FingerprintTable:
        """Return the fingerprints of `paths`, in this order; those of unreadable images only have an `error`.

        Raises:
            ImagesGone: most images are missing.
            ValueError: the database of a part can't be written to.
        """
        prints = FingerprintTable(len(paths))
        max_pixels, allow_truncated = self.limits
        with closing(self._connect(self.path)) as db:
            missing = self._look_up(db, paths, prints)

            def read(path: str) -> tuple[str, Fingerprint]:
                return self._state(path), take_fingerprint(path, max_pixels=max_pixels, allow_truncated=allow_truncated)

            def take(i: int) -> tuple[str, Fingerprint]:
                try:
                    return read_patiently(partial(read, paths[i]), len(paths), paths.__getitem__)
                except ImageError as error:
                    return "", Fingerprint(error=error.cause)

            computed = map_parallel(take, missing, "reading images")
            rows = []
            for i, (state, fingerprint) in zip(missing, computed, strict=True):
                prints[i] = fingerprint
                if not fingerprint.error:
                    rows.append((_key(paths[i]), state, *astuple(fingerprint)))
                if len(rows) == SAVE_EVERY or i == missing[-1]:
                    self._write(db, INSERT, rows)
                    rows.clear()
        return prints

    def _look_up(self, db: sqlite3.Connection, paths: Sequence[str], prints: FingerprintTable) -> Sequence[int]:
        """Fill `prints` with what is known of `paths`; return the indices of the others."""
        missing = array("q")
        with ExitStack() as stack:
            merged = self._open_merged(stack) if self.part else None
            for i, path in enumerate(paths):
                key, state = _key(path), self._state(path)
                fingerprint = _find(db, key, state)
                if merged and not fingerprint:
                    try:
                        fingerprint = _find(merged, key, state)
                    except sqlite3.DatabaseError:  # another process is writing to it for long
                        merged = None
                if fingerprint:
                    prints[i] = fingerprint
                else:
                    missing.append(i)
        return missing

    def _open_merged(self, stack: ExitStack) -> sqlite3.Connection | None:
        """The database of all parts, only to be read; None if there is none, or another process is writing to it."""
        try:
            db = stack.enter_context(closing(self._connect(self.merged, "ro")))
            _check(db)
            db.execute(SELECT, (b"",))
        except sqlite3.DatabaseError:
            return None
        return db

    def merge_parts(self) -> None:
        """Add what the parts have read, and delete their databases. What is invalid in them is skipped."""
        taken: Counter[int] = Counter()
        images = 0
        for part, path in find_parts(self.merged).items() if self.writable else ():
            try:
                images += self._merge(path)
                taken[part.count] += 1
            except sqlite3.OperationalError as error:
                print(f"warning: {path} can't be used ({printable(str(error))}): is that part still running?")
                continue
            except sqlite3.DatabaseError as error:
                print(f"warning: {printable(f'{path} is damaged ({error})')}: its images are read again")
            if self.writable:
                try_unlink(path, "it is merged again next time")
        if taken:
            parts = ", ".join(f"{number} of {count}" for count, number in sorted(taken.items()))
            print(f"merged: {parts} parts with {count_of(images, 'image')}; what is missing is read now")

    def _merge(self, path: Path) -> int:
        """Add the valid rows of the database of a part; return how many."""
        count = 0
        with closing(self._connect(path, "rw")) as part, closing(self._connect(self.path)) as db:
            _check(part)
            part.execute(TABLE)  # it may have been killed before
            found = part.execute(SELECT_ALL)
            while rows := found.fetchmany(MERGE_EVERY):
                valid = [row for row in rows if (type(row[0]), type(row[1])) == (bytes, str) and _from_row(row[2:])]
                self._write(db, INSERT, valid)
                count += len(valid)
        return count

    def preview(self, path: str) -> bytes | None:
        """Return a small JPEG of an image; None if it can't be read."""
        state = f"{PREVIEW} {self._state(path)}"
        with closing(self._connect(self.path)) as db:
            key = _key(path)
            row = db.execute("SELECT state, jpeg FROM previews WHERE path = ?", (key,)).fetchone()
            if row and row[0] == state and isinstance(row[1], bytes) and row[1].startswith(JPEG):
                return row[1]
            try:
                image = open_image(path, *self.limits)
            except ImageError:
                return None
            image.thumbnail((PREVIEW, PREVIEW))
            buffer = io.BytesIO()
            image.save(buffer, "JPEG", quality=80)
            self._write(db, "INSERT OR REPLACE INTO previews VALUES (?, ?, ?)", [(key, state, buffer.getvalue())])
            return buffer.getvalue()

    def _write(self, db: sqlite3.Connection, statement: str, rows: Sequence[Sequence[object]]) -> None:
        if self.writable:
            try:
                with db:
                    db.executemany(statement, rows)
            except sqlite3.OperationalError as error:  # locked, read-only, or the disk is full
                self._disable(error)

    def _disable(self, error: Exception) -> None:
        self.writable = False
        if self.part:
            raise ValueError(
                f"part='{self.part}': {self.path} can't be used ({error}), and a part has no other result; give a "
                f"--cache-dir that all parts can write to"
            ) from error
        print(f"warning: {self.path} can't be used ({error}): audit results are not cached")

    def _state(self, path: str) -> str:
        """Return a string that changes with the file, the limits, and the code that reads images."""
        try:
            status = os.stat(path)
        except OSError:
            return "missing"
        return f"{status.st_size} {status.st_mtime_ns} {self.limits} {READERS} {VERSION}"
