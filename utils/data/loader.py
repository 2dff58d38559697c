"""Data loaders: datasets to batches."""

from __future__ import annotations

import copy
import mmap
import multiprocessing
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from multiprocessing.context import BaseContext
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from utils.data.dataset import ImageDataset
from utils.data.decode_budget import SIZE, SharedBudget, budget
from utils.data.feature_dataset import FeatureDataset
from utils.data.sampler import BatchSampler, EpochSampler, Sampling
from utils.system.files import format_bytes, free_bytes
from utils.system.runtime import runtime
from utils.system.signals import WorkerDied, defer_signals, ignore_signals, watch_workers

SHARED_MEMORY = "/dev/shm"
"""Where Linux has the memory that processes share. In a container it is often small, or can't be written to."""
ENLARGE = "enlarge it, in Docker with --shm-size=2g or --ipc=host"
PREFETCHED = 2
"""Batches that each worker loads in advance."""


def batch_paths(loader: DataLoader, number: int) -> list[str]:
    """Return the files in batch `number` (from 0) of the loader's current epoch."""
    batches = copy.copy(loader.batch_sampler)
    batches.start, batches.rows = number, slice(None)
    return [loader.dataset.images.path(index) for _, index, _ in next(iter(batches))]


def train_loader(
    dataset: ImageDataset | FeatureDataset,
    batch_size: int,
    num_workers: int,
    sampling: Sampling = "shuffle",
    rows: slice = slice(None),
    repeats: int = 1,
) -> DataLoader:
    """Return a loader of uint8 pixels (B, 3, height, width), or features (B, ...), and class ids (B,).

    The last incomplete batch is dropped; shuffling varies which samples. Set `loader.batch_sampler.epoch` and `.start`
    before each epoch; the loader's length is that of a complete epoch.

    Args:
        rows: of each batch of `batch_size` images; a rank loads only its own.
        repeats: how often an epoch goes over the list.
    """
    keys = EpochSampler(dataset.class_ids, sampling, dataset.seed, repeats)
    return _loader(dataset, num_workers, BatchSampler(keys, batch_size, drop_last=True, rows=rows))


def eval_loader(dataset: ImageDataset | FeatureDataset, batch_size: int, num_workers: int) -> DataLoader:
    """Return a loader of every image once, in the list's order; the last batch may be smaller.

    Batches are dealt out: batch b to rank b mod the number of ranks. Whole ones, since kernels for other batch sizes
    round differently. See `utils.system.runtime.Runtime.collect_batches`.
    """
    keys = EpochSampler(dataset.class_ids, None, dataset.seed)
    dealt = (runtime.rank, runtime.world_size)
    return _loader(dataset, num_workers, BatchSampler(keys, batch_size, drop_last=False, dealt=dealt))


def iterate_batches(loader: DataLoader) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the batches of `loader`.

    Raises:
        WorkerDied: a worker process died.
    """
    with defer_signals():  # a signal here could leave workers that are not watched
        batches = iter(loader)
        watch_workers()
    try:
        for batch in batches:
            if isinstance(batch, PipedBatch):
                _warn_about_pipes(loader.num_workers)
                batch = batch.unpack()
            yield batch
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker"):
            raise
        raise WorkerDied(error) from error


@dataclass(frozen=True)
class PipedBatch:
    """A batch as arrays, which pass from a worker through a pipe; tensors would pass through shared memory.

    Attributes:
        arrays: a contiguous array for each tensor.
        orders: of the dimensions of each tensor in its array; pickling would change the memory format.
    """

    arrays: tuple[np.ndarray, ...]
    orders: tuple[tuple[int, ...], ...]

    @staticmethod
    def pack(batch: Sequence[Tensor]) -> PipedBatch:
        orders = tuple(tensor.dim_order() for tensor in batch)
        return PipedBatch(tuple(x.permute(order).numpy() for x, order in zip(batch, orders, strict=True)), orders)

    def unpack(self) -> tuple[Tensor, ...]:
        pairs = zip(self.arrays, self.orders, strict=True)
        return tuple(torch.from_numpy(array).permute(*np.argsort(order).tolist()) for array, order in pairs)


@dataclass(frozen=True)
class WorkerCollate:
    """Collates a batch in one of `num_workers` workers, as a `PipedBatch` if shared memory is short.

    If a batch doesn't fit there, torch waits for it forever, and its file_system strategy needs the same memory.
    """

    dataset: ImageDataset | FeatureDataset
    num_workers: int

    def __call__(self, items: Sequence[Any]) -> tuple[Tensor, ...] | PipedBatch:
        batch = self.dataset.collate(items)
        if not os.path.isdir(SHARED_MEMORY):  # not Linux
            return batch
        waiting = PREFETCHED * self.num_workers * sum(tensor.nbytes + mmap.PAGESIZE for tensor in batch)
        return PipedBatch.pack(batch) if free_bytes(SHARED_MEMORY) < waiting else batch


@dataclass(frozen=True)
class WorkerStart:
    """Prepares a worker: it ignores signals, and takes the memory for decoding from the budget of all workers."""

    shared: SharedBudget

    def __call__(self, worker: int) -> None:
        ignore_signals(worker)
        if runtime.world_size > 1 and sys.platform == "linux":
            # torchrun stops a rank by a signal to its process group, but the step still needs its batch.
            os.setpgid(0, 0)
        budget.share(self.shared)


@cache
def _warn_about_pipes(num_workers: int) -> None:
    """Print, once, that batches pass through pipes."""
    print(
        f"warning: {SHARED_MEMORY} is too small for the batches of {num_workers} workers "
        f"({format_bytes(free_bytes(SHARED_MEMORY))} free), so they pass through pipes, which is slower; {ENLARGE}, "
        f"or lower num_workers"
    )


@cache
def _warn_about_semaphores(cause: str) -> None:
    """Print, once, that the main process loads the images."""
    print(
        f"warning: {SHARED_MEMORY} has no room for the semaphores of workers ({cause}), so the main process loads the "
        f"images (num_workers=0), which is slower; {ENLARGE}"
    )


def _context() -> BaseContext:
    """How workers are started. Forked ones share the list in memory; spawned ones would copy it."""
    return multiprocessing.get_context("fork" if sys.platform == "linux" else None)


def _can_connect(num_workers: int) -> bool:
    """Whether this system provides the semaphores that connect workers; prints a warning if not."""
    context = _context()
    try:
        _ = [context.Lock() for _ in range(8 * (num_workers + 1))]  # a loader has 3 for each worker, and 10
    except OSError as error:
        _warn_about_semaphores(str(error.strerror))
        return False
    return True


def _loader(dataset: ImageDataset | FeatureDataset, num_workers: int, batches: BatchSampler) -> DataLoader:
    num_workers = num_workers if num_workers and _can_connect(num_workers) else 0
    context = _context() if num_workers else None
    return DataLoader(
        dataset,
        batch_sampler=batches,
        num_workers=num_workers,
        collate_fn=WorkerCollate(dataset, num_workers) if num_workers else dataset.collate,
        pin_memory=torch.cuda.is_initialized(),  # don't initialize CUDA in a CPU run
        prefetch_factor=PREFETCHED if num_workers else None,
        persistent_workers=num_workers > 0,
        worker_init_fn=WorkerStart(SharedBudget(SIZE, context)) if context else None,
        multiprocessing_context=context,
    )
