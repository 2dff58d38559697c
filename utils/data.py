"""Lists to batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from utils.images import ImageError
from utils.lists import ImageList
from utils.seeds import derive_seed

Reader = Callable[[str], Image.Image]
"""A path to an upright RGB picture, or an ImageError."""
Transform = Callable[[Image.Image], Tensor]
"""A picture to uint8 pixels (3, height, width)."""


class ImageDataset(Dataset):
    """The pictures of a list, transformed. An item's key is (epoch, index in the list).

    What the transform draws is a function of (seed, epoch, index), whichever worker draws it.
    """

    def __init__(self, images: ImageList, read: Reader, transform: Transform, seed: int) -> None:
        self.images = images
        self.read = read
        self.transform = transform
        self.seed = seed

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int]:
        """One picture, uint8 (3, height, width), and its class id.

        Raises:
            ImageError: the file can't be read.
        """
        epoch, index = key
        torch.default_generator.manual_seed(derive_seed(self.seed, "sample", epoch, index))
        try:
            image = self.read(self.images.path(index))
        except ImageError as error:
            remedy = "mend or remove it, and run python txt_annotation.py to make the lists anew"
            raise ImageError(f"{error}; {remedy}", error.path, error.cause) from error
        return self.transform(image), int(self.images.class_ids[index])


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


def train_loader(
    images: ImageList, read: Reader, transform: Transform, batch_size: int, num_workers: int, seed: int
) -> DataLoader:
    """Batches of uint8 pixels (B, 3, height, width) and class ids (B,), shuffled anew in each epoch.

    All batches are of one size, so what an epoch leaves over sits out, other pictures each time. Set
    `loader.sampler.epoch` before each epoch.
    """
    return _loader(ImageDataset(images, read, transform, seed), batch_size, num_workers, training=True)


def eval_loader(images: ImageList, read: Reader, transform: Transform, batch_size: int, num_workers: int) -> DataLoader:
    """Batches in the list's order, every picture once; the last batch may be smaller."""
    return _loader(ImageDataset(images, read, transform, seed=0), batch_size, num_workers, training=False)


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
