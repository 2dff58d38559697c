"""Features that the frozen part of a network computes, cached in files."""

from __future__ import annotations

import math
import os
import socket
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor
from tqdm import tqdm

from utils.config.train_config import IMAGE_FIELDS, TrainConfig
from utils.data.cache_file import check_disk_space, describe_files, is_intact, replace_cache
from utils.data.dataset import ImageDataset
from utils.data.feature_dataset import FeatureDataset
from utils.data.loader import eval_loader, iterate_batches
from utils.data.preprocessing import Preprocessing
from utils.data.transforms import EvalTransform
from utils.modeling.pixel_network import PixelNetwork
from utils.modeling.precision import DTYPES, autocast
from utils.system.digests import TRAINING_CODE, digest
from utils.system.files import format_bytes, make_folder
from utils.system.runtime import runtime

MAX_BATCH = 64
"""Largest batch size for computing features."""


class FeatureCache:
    """Computes the features of the frozen part of a network once and caches them in files in `cache_dir`.

    A file has one view of each image. Its name is a digest of everything that its features depend on: the list and its
    files, the frozen weights, the transforms, the precision, the view. If any of these changes, a new file replaces it.
    A run that is interrupted while features are computed keeps the views that are complete.

    Args:
        network: freeze it before calling `open`.
        config: the settings.
        device: of the network.
        precision: of the computation and of the file: "fp32", "fp16" or "bf16".
    """

    def __init__(self, network: PixelNetwork, config: TrainConfig, device: torch.device, precision: str) -> None:
        self.network = network
        self.config = config
        self.device = device
        self.precision = precision
        self.dtype = DTYPES[precision]
        # As in training if possible: the same kernels give the same bits. Batches for a head can be far larger.
        self._batch_size = min(config.all_stages[0].batch_size, MAX_BATCH)

    def open(self, dataset: ImageDataset, list_path: str, num_views: int) -> FeatureDataset:
        """The features of `num_views` views of each image: the first as in evaluation, the others augmented.

        Up to `feature_cache_gb` they are held in memory; larger ones are read from their files.

        Args:
            dataset: the images. Those that couldn't be read when the features were computed are marked in it.
            list_path: their list; features of earlier versions of it are deleted.
            num_views: 1 or more.

        Raises:
            ValueError: there isn't enough disk space.
            TooManyUnreadable: see `utils.data.dataset.ImageDataset`.
        """
        blank = torch.zeros(1, 3, *self.config.input_shape, dtype=torch.uint8)
        shape = (len(dataset), *self._compute(blank).shape[1:])
        size = math.prod(shape) * self.dtype.itemsize  # bytes per view
        files = self._files(dataset, list_path, num_views)
        missing = runtime.first(lambda: self._find_missing(files, size + len(dataset)))
        in_memory = num_views * size * runtime.local_world_size <= self.config.feature_cache_gb * 1e9
        print(
            f"features of {num_views} view{'s' * (num_views > 1)} of {len(dataset)} images: "
            f"{format_bytes(num_views * size)}, {len(missing)} to compute, in {self.config.cache_dir}/, "
            f"{'' if in_memory else 'not '}held in memory"
        )
        if missing:
            runtime.first(lambda: self._check_folder(len(missing) * size))
        views = []
        for view, (path, outdated) in enumerate(files):
            if view in missing:
                title = f"features, view {view + 1} of {num_views}"
                with replace_cache(path, replaces=outdated) if runtime.is_main else nullcontext() as file:
                    self._write(dataset, view, size // len(dataset), title, file)
                runtime.first(lambda: None)  # it has its name now
            # Shared, since a private mapping counts as memory and fails if it is larger than the memory.
            stored = torch.from_file(str(path), shared=True, size=size + len(dataset), dtype=torch.uint8)
            features = stored[:size].view(self.dtype).view(shape)
            dataset.unreadable.logical_or_(stored[size:].bool())
            views.append(features.clone() if in_memory else features)
        return FeatureDataset(views, dataset.images, dataset.seed)

    def _find_missing(self, files: Sequence[tuple[Path, str]], size: int) -> list[int]:
        """The views without an intact file of `size` bytes."""
        return [view for view, (path, _) in enumerate(files) if not is_intact(path, size)]

    def _check_folder(self, size: int) -> None:
        """Create the folder, and raise a ValueError unless there is space for files of `size` bytes."""
        make_folder(self.config.cache_dir)
        remedy = "feature_views to fewer, or cache_features to False"
        check_disk_space(size, Path(self.config.cache_dir), remedy)

    def _write(self, dataset: ImageDataset, view: int, row: int, title: str, file: BinaryIO | None) -> None:
        """Write the features of one view, `row` bytes for each image, then a byte for each: 1 if it couldn't be read.

        Each rank writes its batches at their place; rank 0 has opened the `file`.
        """
        plain = dataset.with_transform(EvalTransform(Preprocessing.from_config(self.config)))
        loader = eval_loader(dataset if view else plain, self._batch_size, self.config.num_workers)
        loader.batch_sampler.epoch = view
        name = runtime.first(lambda: file.name)
        batches = tqdm(iterate_batches(loader), title, len(loader), unit="batch", leave=False, disable=None)
        with nullcontext(file) if file else open_shared(name, self.config.cache_dir) as part:
            for number, (pixels, _) in enumerate(batches):
                # The last batch is padded: kernels for smaller batches round differently.
                full_batch = pixels[torch.arange(self._batch_size) % len(pixels)]
                part.seek((number * runtime.world_size + runtime.rank) * self._batch_size * row)
                part.write(self._compute(full_batch)[: len(pixels)].contiguous().view(torch.uint8).numpy())
        dataset.share_between_ranks()
        if file:
            file.seek(len(dataset) * row)
            file.write(dataset.unreadable.to(torch.uint8).numpy())

    @torch.inference_mode()
    def _compute(self, pixels: Tensor) -> Tensor:
        with autocast(self.device, self.precision):
            return self.network.forward_frozen(pixels.to(self.device, non_blocking=True)).to(self.dtype).cpu()

    def _files(self, dataset: ImageDataset, list_path: str, num_views: int) -> list[tuple[Path, str]]:
        """For each view its file, and a glob pattern of the files that it replaces."""
        model = self.network.model
        frozen = model.frozen_state()
        content_digest = digest(
            [
                f"{self.precision} {self.device.type} {torch.__version__} {self._batch_size}",
                f"{model.arguments | {'num_classes': None}}",
                *(f"{field}={getattr(self.config, field)}" for field in IMAGE_FIELDS),
                dataset.class_ids.tobytes(),
                *describe_files(dataset.source.images, TRAINING_CODE),
                *(part for name, value in frozen.items() for part in (name, _bytes(value))),
            ]
        )
        files = []
        for view in range(num_views):
            list_digest = digest([os.path.abspath(list_path), str(view), *frozen])
            path = Path(self.config.cache_dir, f"features-{list_digest}-{content_digest}.bin")
            files.append((path, f"features-{list_digest}-*.bin"))
        return files


def open_shared(name: str, folder: str) -> BinaryIO:
    """Open a file for writing that rank 0 has created.

    Raises:
        ValueError: this machine doesn't have it.
    """
    try:
        return Path(name).open("r+b")
    except FileNotFoundError as error:
        raise ValueError(
            f"cache_dir={folder!r}: the machine {socket.gethostname()} doesn't have the file that rank 0 has created; "
            f"set it to a folder that all machines share, or cache_features to False"
        ) from error


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data
