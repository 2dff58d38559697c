"""Lists to batches."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from utils.images import ImageError, Region
from utils.lists import ImageList
from utils.seeds import derive_seed
from utils.transforms import Preprocessing, Transform


@dataclass(frozen=True)
class FileSource:
    """The pictures of a list, read from their files."""

    images: ImageList
    preprocessing: Preprocessing

    def region(self, index: int, transform: Transform) -> Region:
        """The part of a picture that `transform` wants.

        Raises:
            ImageError: the file can't be read.
        """
        return self.preprocessing.read(self.images.path(index), transform)


class ImageDataset(Dataset):
    """The pictures of a list, transformed. An item's key is (epoch, index in the list).

    What the transform draws is a function of (seed, epoch, index), whichever worker draws it.
    """

    def __init__(self, source: FileSource, transform: Transform, seed: int) -> None:
        self.source = source
        self.class_ids = source.images.class_ids
        self.transform = transform
        self.seed = seed

    def __len__(self) -> int:
        return len(self.class_ids)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int]:
        """One picture, uint8 (3, height, width), and its class id.

        Raises:
            ImageError: the file can't be read.
        """
        epoch, index = key
        torch.default_generator.manual_seed(derive_seed(self.seed, "sample", epoch, index))
        try:
            region = self.source.region(index, self.transform)
        except ImageError as error:
            remedy = "mend or remove it, and run python txt_annotation.py to make the lists anew"
            raise ImageError(f"{error}; {remedy}", error.path, error.cause) from error
        return self.transform.finish(region), int(self.class_ids[index])


class EpochSampler(Sampler):
    """The keys of one epoch: every index once, shuffled by a function of (seed, epoch), or in the list's order."""

    def __init__(self, length: int, shuffle: bool, seed: int) -> None:
        self.length = length
        self.shuffle = shuffle
        self.seed = seed
        self.epoch = 0

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[tuple[int, int]]:
        if self.shuffle:
            generator = torch.Generator().manual_seed(derive_seed(self.seed, "order", self.epoch))
            order = torch.randperm(self.length, generator=generator).numpy()
        else:
            order = range(self.length)
        for index in order:
            yield self.epoch, int(index)


def train_loader(source: FileSource, transform: Transform, batch_size: int, num_workers: int, seed: int) -> DataLoader:
    """Batches of uint8 pixels (B, 3, height, width) and class ids (B,), shuffled anew in each epoch.

    All batches are of one size, so what an epoch leaves over sits out, other pictures each time. Set
    `loader.sampler.epoch` before each epoch.
    """
    return _loader(ImageDataset(source, transform, seed), batch_size, num_workers, training=True)


def eval_loader(source: FileSource, transform: Transform, batch_size: int, num_workers: int) -> DataLoader:
    """Batches in the list's order, every picture once; the last batch may be smaller."""
    return _loader(ImageDataset(source, transform, seed=0), batch_size, num_workers, training=False)


def _loader(dataset: ImageDataset, batch_size: int, num_workers: int, training: bool) -> DataLoader:
    return DataLoader(
        dataset,
        batch_size=batch_size,
        sampler=EpochSampler(len(dataset), training, dataset.seed),
        num_workers=num_workers,
        drop_last=training,
        pin_memory=torch.cuda.is_available(),
        persistent_workers=num_workers > 0,
    )
