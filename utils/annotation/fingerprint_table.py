"""The properties of images that the audit compares, in columns."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

THUMBNAIL = 16
"""Side of the gray thumbnails that are compared for near-duplicates."""
ROW = np.dtype(
    [
        ("format", np.int32),  # number in `FingerprintTable.formats`
        ("width", np.int32),  # 0: not read
        ("height", np.int32),
        ("grey", bool),
        ("flat", bool),
        ("digest", np.uint8, 16),
        ("phash", np.uint8, 8),
        ("thumbnail", np.uint8, THUMBNAIL**2),
    ]
)


@dataclass(frozen=True)
class Fingerprint:
    """The properties of one image.

    Attributes:
        error: why it can't be read; the other fields are empty then.
        format: the format of the content, such as "JPEG"; the suffix may differ.
        width: of the upright image.
        height: of the upright image.
        grey: whether all pixels are gray.
        flat: whether it is blank: one color, or nearly.
        digest: of the pixels, independent of the file format.
        phash: 64-bit perceptual hash; near-duplicates differ in few bits (Zauner, "Implementation and Benchmarking of
            Perceptual Image Hash Functions", 2010).
        thumbnail: gray levels (16, 16), as bytes.
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


class FingerprintTable(Sequence[Fingerprint]):
    """The fingerprints of N images, in 294 bytes each: as objects they take a kilobyte.

    Args:
        length: N; all are empty at first.

    Attributes:
        rows: (N,) of `ROW`; zeros for images that weren't or can't be read.
        errors: index -> why the image can't be read.
        formats: by number.
    """

    def __init__(self, length: int) -> None:
        self.rows = np.zeros(length, ROW)
        self.errors: dict[int, str] = {}
        self.formats: list[str] = []

    @classmethod
    def of(cls, fingerprints: Iterable[Fingerprint]) -> FingerprintTable:
        """A table of these fingerprints."""
        fingerprints = list(fingerprints)
        table = cls(len(fingerprints))
        for i, fingerprint in enumerate(fingerprints):
            table[i] = fingerprint
        return table

    def __len__(self) -> int:
        return len(self.rows)

    def __setitem__(self, i: int, fingerprint: Fingerprint) -> None:
        if fingerprint.error:
            self.errors[i] = fingerprint.error
            return
        if fingerprint.format not in self.formats:
            self.formats.append(fingerprint.format)
        columns = (fingerprint.digest, fingerprint.phash, fingerprint.thumbnail)
        self.rows[i] = (
            self.formats.index(fingerprint.format),
            fingerprint.width,
            fingerprint.height,
            fingerprint.grey,
            fingerprint.flat,
            *(np.frombuffer(column, np.uint8) for column in columns),
        )

    def __getitem__(self, i: int) -> Fingerprint:
        row = self.rows[i]
        if not row["width"]:
            return Fingerprint(error=self.errors.get(i, ""))
        number, width, height, grey, flat, *columns = row.item()
        content = (column.tobytes() for column in columns)
        return Fingerprint("", self.formats[number], width, height, grey, flat, *content)

    def readable(self) -> np.ndarray:
        """The indices of the images that could be read."""
        return np.flatnonzero(self.rows["width"])
