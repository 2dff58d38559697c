"""Lists to batches."""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Literal, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from utils.images import ImageError, Region
from utils.lists import ImageList, count_earlier
from utils.seeds import derive_seed
from utils.stop import WorkerDied, held, ignore_interrupt, watch_workers
from utils.transforms import Preprocessing, Transform

Key = tuple[int, int, int]
Sampling = Literal["shuffle", "balanced"]


class Source(Protocol):
    """Where the pictures of a list come from: their files, or `utils.image_cache.ImageCache`."""

    images: ImageList

    def region(self, index: int, transform: Transform) -> Region:
        """The part of a picture that `transform` wants.

        Raises:
            ImageError: it can't be read.
        """


@dataclass(frozen=True)
class FileSource:
    """The pictures of a list, read from their files."""

    images: ImageList
    preprocessing: Preprocessing

    def region(self, index: int, transform: Transform) -> Region:
        """See `Source`."""
        return self.preprocessing.read(self.images.path(index), transform)


class TooManyUnreadable(ImageError):
    """More pictures than `max_bad_fraction` allows couldn't be read."""


class ImageDataset(Dataset):
    """The pictures of a list, transformed.

    An item's key is (epoch, index in the list, how often that index came before in the epoch). What the transform draws
    is a function of the seed and the key, whichever worker draws it.

    Args:
        source: where the pictures come from.
        transform: what is made of them.
        seed: of all that is drawn.
        max_bad_fraction: the part of the pictures, 0 to 1, that may be unreadable: another picture of the class, always
            the same, stands in for each. None: the first one is an error.

    Attributes:
        images: the list.
        class_ids: (n,).
        unreadable: (n,) bool, the pictures that couldn't be read so far.
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
        self._told: set[int] = set()

    def with_transform(self, transform: Transform) -> ImageDataset:
        """The same pictures, with one account of those that can't be read, otherwise transformed."""
        other = copy.copy(self)
        other.transform = transform
        return other

    def take_account(self, other: ImageDataset) -> None:
        """Go on with the account that `other` kept of the same pictures that can't be read."""
        self.unreadable, self._told = other.unreadable, other._told

    def __len__(self) -> int:
        return len(self.class_ids)

    def __getitem__(self, key: Key) -> tuple[Tensor, int]:
        """One picture, uint8 (3, height, width), and its class id.

        Raises:
            ImageError: the file can't be read, and none may stand in for it, or none can.
            TooManyUnreadable: there are more such files than `max_bad_fraction` allows.
        """
        return self.__getitems__([key])[0]

    def __getitems__(self, keys: Sequence[Key]) -> list[tuple[Tensor, int]]:
        """The items of a batch. First all are read, then all augmented: a processor's cache doesn't hold the code of
        both, so that going to and fro takes a tenth longer."""
        pixels = [self._read(key) for key in keys]
        items = []
        for key, picture in zip(keys, pixels, strict=True):
            self._seed("augment", key)
            items.append((self.transform.augment(picture), int(self.class_ids[key[1]])))
        return items

    @staticmethod
    def collate(items: Sequence[tuple[Tensor, int]]) -> tuple[Tensor, Tensor]:
        """Items to a batch, whose colours lie next to each other in memory as they do in the pictures: a plain copy."""
        pixels, class_ids = zip(*items, strict=True)
        stacked = torch.stack([picture.permute(1, 2, 0) for picture in pixels])  # (B, height, width, 3)
        return stacked.permute(0, 3, 1, 2), torch.tensor(class_ids)

    def _seed(self, purpose: str, key: Key) -> None:
        torch.default_generator.manual_seed(derive_seed(self.seed, purpose, *key))

    def _read(self, key: Key) -> Tensor:
        index = key[1]
        try:
            self._seed("crop", key)
            return self.transform.resize(self.source.region(index, self.transform))
        except ImageError as error:
            if self.max_bad_fraction is None:
                remedy = "mend or remove it; txt_annotation.py with its flags and --fix leaves such pictures out"
                raise ImageError(f"{error}; {remedy}", error.path, error.cause) from error
            self.unreadable[index] = True
            self._check_unreadable()
            return self._read_another(key, error)

    def _read_another(self, key: Key, error: ImageError) -> Tensor:
        """The first picture that can be read of its class, in an order that depends on (seed, index)."""
        index = key[1]
        others = np.flatnonzero(self.class_ids == self.class_ids[index])
        for other in np.random.default_rng(derive_seed(self.seed, "stand-in", index)).permutation(others):
            try:
                self._seed("crop", key)
                return self.transform.resize(self.source.region(int(other), self.transform))
            except ImageError:
                continue
        told = f"{error}; nor can any other picture of its class (id {self.class_ids[index]})"
        raise ImageError(told, error.path, error.cause) from error

    def _check_unreadable(self) -> None:
        bad = self.unreadable.nonzero().flatten().tolist()
        if len(bad) > self.max_bad_fraction * len(self):
            named = ", ".join(self.images.path(i) for i in bad[:5]) + (", ..." if len(bad) > 5 else "")
            raise TooManyUnreadable(
                f"{len(bad)} of {len(self)} pictures can't be read, more than max_bad_fraction="
                f"{self.max_bad_fraction}: {named}; mend or remove them, or run python "
                f"txt_annotation.py, with the flags as before and --fix, to have lists without them"
            )

    def newly_unreadable(self) -> list[str]:
        """The pictures that couldn't be read and weren't told by an earlier call."""
        new = [i for i in self.unreadable.nonzero().flatten().tolist() if i not in self._told]
        self._told.update(new)
        return [self.images.path(i) for i in new]


class FeatureDataset(Dataset):
    """What the frozen part of a network made of the pictures of a list: a drop-in for `ImageDataset` behind it.

    Args:
        views: of each the features (n, ...); which of them of a picture comes changes from epoch to epoch.
        images: the list.
        seed: of the order.
    """

    def __init__(self, views: Sequence[Tensor], images: ImageList, seed: int) -> None:
        self.views = tuple(views)
        self.images = images
        self.class_ids = images.class_ids
        self.targets = torch.from_numpy(images.class_ids.astype(np.int64))
        self.seed = seed

    def __len__(self) -> int:
        return len(self.class_ids)

    def __getitems__(self, keys: Sequence[Key]) -> tuple[Tensor, Tensor]:
        """A batch: features (B, ...) and class ids (B,)."""
        epoch, index, repeat = torch.tensor(keys).unbind(1)
        of_view = (epoch + index + repeat) % len(self.views)
        batch = self.views[0].new_empty(len(keys), *self.views[0].shape[1:])
        for number, features in enumerate(self.views):
            rows = (of_view == number).nonzero()[:, 0]
            batch[rows] = features[index[rows]]
        return batch, self.targets[index]

    @staticmethod
    def collate(batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Nothing is left to do."""
        return batch


class EpochSampler(Sampler):
    """The keys of one epoch, in an order that is a function of (seed, epoch).

    Args:
        class_ids: (n,), of the pictures.
        sampling: "shuffle": every picture once; "balanced": n draws, every class equally often in the mean, so that
            pictures of small classes come several times and those of large ones not in every epoch; None: in the list's
            order.
        seed: another seed gives other orders.

    Attributes:
        epoch: which one, from 0.
        start: how many of its keys are left out at the beginning, since they were trained on already.
    """

    def __init__(self, class_ids: np.ndarray, sampling: Sampling | None, seed: int) -> None:
        self.class_ids = class_ids
        self.sampling = sampling
        self.seed = seed
        self.epoch = 0
        self.start = 0

    def __len__(self) -> int:
        return len(self.class_ids)

    def __iter__(self) -> Iterator[Key]:
        generator = torch.Generator().manual_seed(derive_seed(self.seed, "order", self.epoch))
        if self.sampling == "shuffle":
            order = torch.randperm(len(self), generator=generator).numpy()
        elif self.sampling == "balanced":
            order = self._balanced(generator)
        else:
            order = np.arange(len(self))
        repeats = count_earlier(order) if self.sampling == "balanced" else np.zeros(len(self), np.uint8)
        for index, repeat in zip(order[self.start :], repeats[self.start :], strict=True):
            yield self.epoch, int(index), int(repeat)

    def _balanced(self, generator: torch.Generator) -> np.ndarray:
        by_class = np.argsort(self.class_ids, kind="stable")
        _, starts, counts = np.unique(self.class_ids[by_class], return_index=True, return_counts=True)
        drawn = torch.randint(len(counts), (len(self),), generator=generator).numpy()
        within = torch.rand(len(self), generator=generator, dtype=torch.float64).numpy() * counts[drawn]
        return by_class[starts[drawn] + within.astype(np.int64)]


def batch_paths(loader: DataLoader, number: int) -> list[str]:
    """The files of the batch `number` (from 0) of the epoch that `loader` is at."""
    sampler = copy.copy(loader.sampler)
    sampler.start = number * loader.batch_size
    return [loader.dataset.images.path(index) for _, index, _ in islice(sampler, loader.batch_size)]


def balanced_class_weights(class_ids: np.ndarray, num_classes: int) -> Tensor:
    """Weights (num_classes,) for the loss that make every class count alike: n / (classes x pictures of the class).

    The mean over the pictures is 1; a class without pictures has weight 0. The same as scikit-learn's "balanced".
    """
    counts = np.bincount(class_ids, minlength=num_classes)
    weights = len(class_ids) / (np.count_nonzero(counts) * np.maximum(counts, 1)) * (counts > 0)
    return torch.from_numpy(weights).float()


def train_loader(
    dataset: ImageDataset | FeatureDataset, batch_size: int, num_workers: int, sampling: Sampling = "shuffle"
) -> DataLoader:
    """Batches of uint8 pixels (B, 3, height, width), or of features (B, ...), and class ids (B,), anew in each epoch.

    All batches are of one size, so what an epoch leaves over sits out, other pictures each time. Set
    `loader.sampler.epoch` and `.start` before each epoch; the loader's length is that of a whole one.
    """
    return _loader(dataset, batch_size, num_workers, sampling)


def eval_loader(dataset: ImageDataset | FeatureDataset, batch_size: int, num_workers: int) -> DataLoader:
    """Batches in the list's order, every picture once; the last batch may be smaller."""
    return _loader(dataset, batch_size, num_workers, None)


def fetch(loader: DataLoader) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches of `loader`.

    Raises:
        WorkerDied: one of its workers did.
    """
    with held():  # so that no worker is started that nobody knows of
        batches = iter(loader)
        watch_workers()
    try:
        yield from batches
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker"):
            raise
        raise WorkerDied(error) from error


def _loader(
    dataset: ImageDataset | FeatureDataset, batch_size: int, num_workers: int, sampling: Sampling | None
) -> DataLoader:
    return DataLoader(
        dataset,
        batch_size=batch_size,
        sampler=EpochSampler(dataset.class_ids, sampling, dataset.seed),
        num_workers=num_workers,
        collate_fn=dataset.collate,
        drop_last=sampling is not None,
        pin_memory=torch.cuda.is_initialized(),  # a run on the processor leaves the GPU alone
        persistent_workers=num_workers > 0,
        worker_init_fn=ignore_interrupt,
        # Forked workers share the list; those that are spawned each get a copy of it.
        multiprocessing_context="fork" if num_workers and sys.platform == "linux" else None,
    )
