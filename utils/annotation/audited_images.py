"""The images of an audit, with splits, classes and fingerprints."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from utils.annotation.fingerprint_table import Fingerprint, FingerprintTable
from utils.annotation.folder_scan import SPLITS


@dataclass(frozen=True)
class AuditedImage:
    """An image with its split, class and fingerprint."""

    path: str
    split: str
    class_name: str
    fingerprint: Fingerprint


@dataclass(frozen=True)
class AuditedImages(Sequence[AuditedImage]):
    """N images in columns, which are made into objects one at a time.

    Attributes:
        paths: of the images.
        splits: (N,) numbers in `SPLITS`.
        class_ids: (N,) numbers in `class_names`.
        class_names: the names.
        prints: their fingerprints.
    """

    paths: Sequence[str]
    splits: np.ndarray
    class_ids: np.ndarray
    class_names: Sequence[str]
    prints: FingerprintTable

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> AuditedImage:
        name = self.class_names[self.class_ids[i]]
        return AuditedImage(self.paths[i], SPLITS[self.splits[i]], name, self.prints[i])

    def pick(self, indices: Iterable[int]) -> list[AuditedImage]:
        """The images of these indices."""
        return [self[int(i)] for i in indices]
