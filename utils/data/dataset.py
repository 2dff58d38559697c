"""The dataset of decoded and transformed images."""

from __future__ import annotations

import copy
import mmap
import os
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from utils.data.image_io import ImageError
from utils.data.image_list import ImageList
from utils.data.preprocessing import Preprocessing
from utils.data.retry import read_patiently
from utils.data.sampler import Key
from utils.data.transforms import Decodable, Transform
from utils.system.runtime import runtime
from utils.system.seeds import derive_seed


class Source(Protocol):
    """Where the images of a list are read from: `FileSource` or `utils.data.image_cache.ImageCache`."""

    images: ImageList

    def open(self, index: int) -> AbstractContextManager[Decodable]:
        """Open an image for decoding.

        Raises:
            ImageError: the image can't be read; decoding it may raise this too.
        """


@dataclass(frozen=True)
class FileSource:
    """The images of a list, read from their files."""

    images: ImageList
    preprocessing: Preprocessing

    def open(self, index: int) -> AbstractContextManager[Decodable]:
        """See `Source`."""
        return self.preprocessing.open(self.images.path(index))


MISSING_REMEDY = "make it available again, or run python txt_annotation.py with the same flags"
DAMAGED_REMEDY = "repair or remove it, or run python txt_annotation.py with the same flags and --fix"


class TooManyUnreadable(ImageError):
    """More images are unreadable than `max_bad_fraction` allows."""


def shared_flags(count: int) -> Tensor:
    """(count,) bool, all False, in memory that worker processes share."""
    if sys.platform == "linux":  # forked workers inherit the mapping; /dev/shm may be full or read-only
        return torch.frombuffer(mmap.mmap(-1, max(1, count)), dtype=torch.bool, count=count)
    return torch.zeros(count, dtype=torch.bool).share_memory_()


class ImageDataset(Dataset):
    """The transformed images of a list.

    An item's key is (epoch, index in the list, number of earlier occurrences of the index in this epoch). All random
    choices are a function of seed and key, independent of the worker.

    Args:
        source: where the images are read from.
        transform: applied to each image.
        seed: determines all random choices.
        max_bad_fraction: the fraction of images, 0 to 1, that may be unreadable. Each of them is replaced by a fixed
            other image of its class. None: the first unreadable image is an error.

    Attributes:
        images: the list.
        class_ids: (n,).
        unreadable: (n,) bool, the images found unreadable so far.
    """

    def __init__(self, source: Source, transform: Transform, seed: int, max_bad_fraction: float | None = None) -> None:
        self.source = source
        self.transform = transform
        self.seed = seed
        self.max_bad_fraction = max_bad_fraction
        self.images = source.images
        self.class_ids = source.images.class_ids
        self.unreadable = shared_flags(len(self.class_ids))  # the main process reports what the workers record
        self._reported: set[int] = set()

    def with_transform(self, transform: Transform) -> ImageDataset:
        """Return a copy with another transform, sharing the record of unreadable images."""
        other = copy.copy(self)
        other.transform = transform
        return other

    def share_unreadable(self, other: ImageDataset) -> None:
        """Use the record of unreadable images of `other`, a dataset of the same list."""
        self.unreadable, self._reported = other.unreadable, other._reported

    def share_between_ranks(self) -> None:
        """Record the unreadable images of all ranks on each rank.

        Raises:
            TooManyUnreadable: more files are unreadable than `max_bad_fraction` allows.
        """
        runtime.unite(self.unreadable)
        if runtime.world_size > 1 and self.max_bad_fraction is not None:
            self._check_unreadable()

    def __len__(self) -> int:
        return len(self.class_ids)

    def __getitem__(self, key: Key) -> tuple[Tensor, int]:
        """Return one image, uint8 (3, height, width), and its class id.

        Raises:
            ImageError: the file can't be read and can't be replaced.
            TooManyUnreadable: more files are unreadable than `max_bad_fraction` allows.
        ImagesGone: most images are missing, see `utils.data.retry.read_patiently`.
        """
        return self.__getitems__([key])[0]

    def __getitems__(self, keys: Sequence[Key]) -> list[tuple[Tensor, int]]:
        """Return the items of a batch.

        All images are read before any is augmented: the code of both doesn't fit into the CPU's instruction cache, and
        alternating takes a tenth longer.
        """
        batch = [self._read(key) for key in keys]
        items = []
        for key, pixels in zip(keys, batch, strict=True):
            self._seed("augment", key)
            items.append((self.transform.augment(pixels), int(self.class_ids[key[1]])))
        return items

    @staticmethod
    def collate(items: Sequence[tuple[Tensor, int]]) -> tuple[Tensor, Tensor]:
        """Stack items into a batch in channels-last memory format, the format of the images: a plain copy."""
        pixels, class_ids = zip(*items, strict=True)
        stacked = torch.stack([image.movedim(-3, -1) for image in pixels])  # (B, ..., height, width, 3)
        return stacked.movedim(-1, -3), torch.tensor(class_ids)

    def newly_unreadable(self) -> list[str]:
        """Return the paths of unreadable images that earlier calls didn't return."""
        new = [i for i in self.unreadable.nonzero().flatten().tolist() if i not in self._reported]
        self._reported.update(new)
        return [self.images.path(i) for i in new]

    def _seed(self, purpose: str, key: Key) -> None:
        torch.default_generator.manual_seed(derive_seed(self.seed, purpose, *key))

    def _crop(self, index: int, key: Key) -> Tensor:
        """Read image `index` with the random crop of `key`, and resize it."""
        self._seed("crop", key)
        with self.source.open(index) as image:
            region = self.transform.region(image)
        return self.transform.resize(region)

    def _read(self, key: Key) -> Tensor:
        index = key[1]
        try:
            if self.unreadable[index]:  # known, so it isn't waited for again
                return self._crop(index, key)
            return read_patiently(lambda: self._crop(index, key), len(self), self.images.path)
        except ImageError as error:
            if self.max_bad_fraction is None:
                remedy = MISSING_REMEDY if error.missing else DAMAGED_REMEDY
                raise ImageError(f"{error}; {remedy}", error.path, error.cause) from error
            self.unreadable[index] = True
            self._check_unreadable()
            return self._read_replacement(key, error)

    def _read_replacement(self, key: Key, error: ImageError) -> Tensor:
        """Read the first readable image of the same class, in an order that depends on (seed, index)."""
        index = key[1]
        candidates = np.flatnonzero(self.class_ids == self.class_ids[index])
        for other in np.random.default_rng(derive_seed(self.seed, "stand-in", index)).permutation(candidates):
            try:
                return self._crop(int(other), key)
            except ImageError:
                continue
        message = f"{error}; no other image of its class (id {self.class_ids[index]}) can be read either"
        raise ImageError(message, error.path, error.cause) from error

    def _check_unreadable(self) -> None:
        bad = self.unreadable.nonzero().flatten().tolist()
        if len(bad) > self.max_bad_fraction * len(self):
            paths = [self.images.path(i) for i in bad]
            raise TooManyUnreadable(
                f"max_bad_fraction={self.max_bad_fraction}: {len(bad)} of {len(self)} images can't be read; "
                f"{_remedy(paths)}"
            )


def _remedy(paths: list[str]) -> str:
    """What to do about unreadable images, of which some may be missing and others damaged."""
    missing = [path for path in paths if not os.path.exists(path)]
    damaged = [path for path in paths if os.path.exists(path)]
    parts = []
    if missing:
        parts.append(f"missing: {_some(missing)}; {MISSING_REMEDY}")
    if damaged:
        parts.append(f"damaged: {_some(damaged)}; {DAMAGED_REMEDY}")
    return "; ".join(parts)


def _some(paths: list[str]) -> str:
    return f"{len(paths)} ({', '.join(paths[:5])}{', ...' if len(paths) > 5 else ''})"
