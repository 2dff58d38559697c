"""The images of a list, decoded and transformed."""

from __future__ import annotations

import copy
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
from utils.data.sampler import Key
from utils.data.transforms import Decodable, Transform
from utils.system.seeds import derive_seed


class Source(Protocol):
    """Where the images of a list come from: their files, or `utils.data.image_cache.ImageCache`."""

    images: ImageList

    def open(self, index: int) -> AbstractContextManager[Decodable]:
        """An image, of which a part can be decoded.

        Raises:
            ImageError: it can't be read; also raised while a part is decoded.
        """


@dataclass(frozen=True)
class FileSource:
    """The images of a list, read from their files."""

    images: ImageList
    preprocessing: Preprocessing

    def open(self, index: int) -> AbstractContextManager[Decodable]:
        """See `Source`."""
        return self.preprocessing.open(self.images.path(index))


class TooManyUnreadable(ImageError):
    """More images than `max_bad_fraction` allows couldn't be read."""


class ImageDataset(Dataset):
    """The images of a list, transformed.

    An item's key is (epoch, index in the list, how often that index came before in the epoch). What the transform draws
    is a function of the seed and the key, whichever worker draws it.

    Args:
        source: where the images come from.
        transform: what is made of them.
        seed: of all that is drawn.
        max_bad_fraction: the part of the images, 0 to 1, that may be unreadable: another image of the class, always
            the same, stands in for each. None: the first one is an error.

    Attributes:
        images: the list.
        class_ids: (n,).
        unreadable: (n,) bool, the images that couldn't be read so far.
    """

    def __init__(self, source: Source, transform: Transform, seed: int, max_bad_fraction: float | None = None) -> None:
        self.source = source
        self.transform = transform
        self.seed = seed
        self.max_bad_fraction = max_bad_fraction
        self.images = source.images
        self.class_ids = source.images.class_ids
        # In memory that workers share, so that the main process knows what they met.
        self.unreadable = torch.zeros(len(self.class_ids), dtype=torch.bool).share_memory_()
        self._reported: set[int] = set()

    def with_transform(self, transform: Transform) -> ImageDataset:
        """The same images, with one account of those that can't be read, otherwise transformed."""
        other = copy.copy(self)
        other.transform = transform
        return other

    def share_unreadable(self, other: ImageDataset) -> None:
        """Go on with the account that `other` kept of the same images that can't be read."""
        self.unreadable, self._reported = other.unreadable, other._reported

    def __len__(self) -> int:
        return len(self.class_ids)

    def __getitem__(self, key: Key) -> tuple[Tensor, int]:
        """One image, uint8 (3, height, width), and its class id.

        Raises:
            ImageError: the file can't be read, and none may stand in for it, or none can.
            TooManyUnreadable: there are more such files than `max_bad_fraction` allows.
        """
        return self.__getitems__([key])[0]

    def __getitems__(self, keys: Sequence[Key]) -> list[tuple[Tensor, int]]:
        """The items of a batch. First all are read, then all augmented: a processor's cache doesn't hold the code of
        both, so that going to and fro takes a tenth longer."""
        batch = [self._read(key) for key in keys]
        items = []
        for key, pixels in zip(keys, batch, strict=True):
            self._seed("augment", key)
            items.append((self.transform.augment(pixels), int(self.class_ids[key[1]])))
        return items

    @staticmethod
    def collate(items: Sequence[tuple[Tensor, int]]) -> tuple[Tensor, Tensor]:
        """Items to a batch, whose colours lie next to each other in memory as they do in the images: a plain copy."""
        pixels, class_ids = zip(*items, strict=True)
        stacked = torch.stack([image.permute(1, 2, 0) for image in pixels])  # (B, height, width, 3)
        return stacked.permute(0, 3, 1, 2), torch.tensor(class_ids)

    def _seed(self, purpose: str, key: Key) -> None:
        torch.default_generator.manual_seed(derive_seed(self.seed, purpose, *key))

    def _crop(self, index: int, key: Key) -> Tensor:
        """The image `index`, cropped as `key` says and resized."""
        self._seed("crop", key)
        with self.source.open(index) as image:
            region = self.transform.region(image)
        return self.transform.resize(region)

    def _read(self, key: Key) -> Tensor:
        index = key[1]
        try:
            return self._crop(index, key)
        except ImageError as error:
            if self.max_bad_fraction is None:
                remedy = "mend or remove it; txt_annotation.py with its flags and --fix leaves such images out"
                raise ImageError(f"{error}; {remedy}", error.path, error.cause) from error
            self.unreadable[index] = True
            self._check_unreadable()
            return self._read_another(key, error)

    def _read_another(self, key: Key, error: ImageError) -> Tensor:
        """The first image that can be read of its class, in an order that depends on (seed, index)."""
        index = key[1]
        others = np.flatnonzero(self.class_ids == self.class_ids[index])
        for other in np.random.default_rng(derive_seed(self.seed, "stand-in", index)).permutation(others):
            try:
                return self._crop(int(other), key)
            except ImageError:
                continue
        told = f"{error}; nor can any other image of its class (id {self.class_ids[index]})"
        raise ImageError(told, error.path, error.cause) from error

    def _check_unreadable(self) -> None:
        bad = self.unreadable.nonzero().flatten().tolist()
        if len(bad) > self.max_bad_fraction * len(self):
            named = ", ".join(self.images.path(i) for i in bad[:5]) + (", ..." if len(bad) > 5 else "")
            raise TooManyUnreadable(
                f"{len(bad)} of {len(self)} images can't be read, more than max_bad_fraction="
                f"{self.max_bad_fraction}: {named}; mend or remove them, or run python "
                f"txt_annotation.py, with the flags as before and --fix, to have lists without them"
            )

    def newly_unreadable(self) -> list[str]:
        """The images that couldn't be read and weren't told by an earlier call."""
        new = [i for i in self.unreadable.nonzero().flatten().tolist() if i not in self._reported]
        self._reported.update(new)
        return [self.images.path(i) for i in new]
