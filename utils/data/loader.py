"""Data loaders: datasets to batches."""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator
from itertools import islice

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from utils.data.dataset import ImageDataset
from utils.data.feature_dataset import FeatureDataset
from utils.data.sampler import EpochSampler, Sampling
from utils.system.signals import WorkerDied, defer_signals, ignore_interrupt, watch_workers


def batch_paths(loader: DataLoader, number: int) -> list[str]:
    """Return the files in batch `number` (from 0) of the loader's current epoch."""
    sampler = copy.copy(loader.sampler)
    sampler.start = number * loader.batch_size
    return [loader.dataset.images.path(index) for _, index, _ in islice(sampler, loader.batch_size)]


def train_loader(
    dataset: ImageDataset | FeatureDataset, batch_size: int, num_workers: int, sampling: Sampling = "shuffle"
) -> DataLoader:
    """Return a loader of uint8 pixels (B, 3, height, width), or features (B, ...), and class ids (B,).

    The last incomplete batch is dropped; shuffling varies which samples. Set `loader.sampler.epoch` and `.start` before
    each epoch; the loader's length is that of a complete epoch.
    """
    return _loader(dataset, batch_size, num_workers, sampling)


def eval_loader(dataset: ImageDataset | FeatureDataset, batch_size: int, num_workers: int) -> DataLoader:
    """Return a loader of every image once, in the list's order; the last batch may be smaller."""
    return _loader(dataset, batch_size, num_workers, None)


def iterate_batches(loader: DataLoader) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the batches of `loader`.

    Raises:
        WorkerDied: a worker process died.
    """
    with defer_signals():  # a signal here could leave workers that are not watched
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
        pin_memory=torch.cuda.is_initialized(),  # don't initialize CUDA in a CPU run
        persistent_workers=num_workers > 0,
        worker_init_fn=ignore_interrupt,
        # Forked workers share the list in memory; spawned ones would copy it.
        multiprocessing_context="fork" if num_workers and sys.platform == "linux" else None,
    )
