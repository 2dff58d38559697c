"""The order of the samples in an epoch, as a function of (seed, epoch)."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Literal

import numpy as np
import torch
from torch.utils.data import Sampler

from utils.data.image_list import count_earlier
from utils.system.seeds import derive_seed

Key = tuple[int, int, int]
Sampling = Literal["shuffle", "balanced"]


class EpochSampler(Sampler):
    """Yields the keys of one epoch, see `ImageDataset`.

    Args:
        class_ids: (n,), one per image.
        sampling: "shuffle": every image once; "balanced": n samples with replacement, all classes equally likely; None:
            every image once, in the list's order.
        seed: determines the order.
        repeats: how often the epoch goes over the list.

    Attributes:
        epoch: from 0.
        start: keys skipped at the start of the epoch, used when a run is resumed.
    """

    def __init__(self, class_ids: np.ndarray, sampling: Sampling | None, seed: int, repeats: int = 1) -> None:
        self.class_ids = class_ids
        self.sampling = sampling
        self.seed = seed
        self.repeats = repeats
        self.epoch = 0
        self.start = 0

    def __len__(self) -> int:
        return self.repeats * len(self.class_ids)

    def __iter__(self) -> Iterator[Key]:
        generator = torch.Generator().manual_seed(derive_seed(self.seed, "order", self.epoch))
        if self.sampling == "shuffle":
            rounds = [torch.randperm(len(self.class_ids), generator=generator) for _ in range(self.repeats)]
            order = torch.cat(rounds).numpy()
        elif self.sampling == "balanced":
            order = self._balanced_order(generator)
        else:
            order = np.tile(np.arange(len(self.class_ids)), self.repeats)
        once = self.sampling != "balanced" and self.repeats == 1
        earlier = np.zeros(len(self), np.uint8) if once else count_earlier(order)
        for index, repeat in zip(order[self.start :], earlier[self.start :], strict=True):
            yield self.epoch, int(index), int(repeat)

    def _balanced_order(self, generator: torch.Generator) -> np.ndarray:
        by_class = np.argsort(self.class_ids, kind="stable")
        _, starts, counts = np.unique(self.class_ids[by_class], return_index=True, return_counts=True)
        classes = torch.randint(len(counts), (len(self),), generator=generator).numpy()
        within = torch.rand(len(self), generator=generator, dtype=torch.float64).numpy() * counts[classes]
        return by_class[starts[classes] + within.astype(np.int64)]


class BatchSampler(Sampler):
    """Yields the batches of one epoch as lists of keys, or the share of one rank.

    Args:
        keys: of the epoch.
        batch_size: keys per batch, of all ranks together.
        drop_last: whether to drop the last incomplete batch.
        rows: the rows of each batch that this rank takes.
        dealt: (r, n): this rank takes batch r and every n-th after it.

    Attributes:
        epoch: from 0.
        start: batches skipped at the start of the epoch, used when a run is resumed.
    """

    def __init__(
        self,
        keys: EpochSampler,
        batch_size: int,
        drop_last: bool,
        rows: slice = slice(None),
        dealt: tuple[int, int] = (0, 1),
    ) -> None:
        self.keys = keys
        self.batch_size = batch_size
        self.drop_last = drop_last
        self.rows = rows
        self.dealt = dealt
        self.epoch = 0
        self.start = 0

    def __len__(self) -> int:
        return len(range(self.dealt[0], self._count, self.dealt[1]))

    @property
    def longest(self) -> int:
        """The number of batches of the rank with the most."""
        return len(range(0, self._count, self.dealt[1]))

    @property
    def _count(self) -> int:
        """Batches of all ranks."""
        rest = len(self.keys) % self.batch_size > 0 and not self.drop_last
        return len(self.keys) // self.batch_size + rest

    def __iter__(self) -> Iterator[list[Key]]:
        self.keys.epoch, self.keys.start = self.epoch, self.start * self.batch_size
        keys = iter(self.keys)
        for number in range(self.start, self._count):
            batch = list(islice(keys, self.batch_size))
            if number % self.dealt[1] == self.dealt[0]:
                yield batch[self.rows]
