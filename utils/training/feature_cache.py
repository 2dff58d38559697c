"""What the frozen part of a network makes of the images, computed once and kept in a file."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor
from tqdm import tqdm

from utils.config.train_config import IMAGE_FIELDS, TrainConfig
from utils.data.cache_file import check_disk_space, describe_files, replace_cache
from utils.data.dataset import ImageDataset
from utils.data.feature_dataset import FeatureDataset
from utils.data.loader import eval_loader, iterate_batches
from utils.data.preprocessing import Preprocessing
from utils.data.transforms import EvalTransform
from utils.modeling.pixel_network import PixelNetwork
from utils.modeling.precision import DTYPES, autocast
from utils.system.digests import TRAINING_CODE, digest
from utils.system.files import format_bytes

MAX_BATCH = 64
"""Images that go through the frozen part at a time, at most."""


class FeatureCache:
    """What the frozen part of a network makes of images, computed once and kept in files in `cache_dir`.

    A file has one view of each image, and is named after all that its features depend on: the list and its files,
    the frozen weights, the transforms, the arithmetic, the view. If one of them changes, another takes its place. A run
    that is cut off before the first step finds the views that were done.

    Args:
        network: as far frozen as it shall be when `open` is called.
        config: the settings.
        device: where the network is.
        precision: of the computation and of the file: "fp32", "fp16" or "bf16".
    """

    def __init__(self, network: PixelNetwork, config: TrainConfig, device: torch.device, precision: str) -> None:
        self.network = network
        self.config = config
        self.device = device
        self.precision = precision
        self.dtype = DTYPES[precision]
        # That of training as far as it can be, so that the same kernels give the same bits; heads take far larger ones.
        self._batch_size = min(config.all_stages[0].batch_size, MAX_BATCH)

    def open(self, dataset: ImageDataset, list_path: str, num_views: int) -> FeatureDataset:
        """The features of `num_views` views of each image: the first as in evaluation, the others as the dataset
        transforms them. Up to `feature_cache_gb` they are held in memory, beyond they are read when they are needed.

        Args:
            dataset: the images. Those that couldn't be read when the features were computed are marked in it.
            list_path: the list that they are from; features of an earlier state of it are removed.
            num_views: 1 or more.

        Raises:
            ValueError: there isn't room enough.
            TooManyUnreadable: see `utils.data.dataset.ImageDataset`.
        """
        blank = torch.zeros(1, 3, *self.config.input_shape, dtype=torch.uint8)
        shape = (len(dataset), *self._compute(blank).shape[1:])
        size = math.prod(shape) * self.dtype.itemsize  # of a view
        places = self._places(dataset, list_path, num_views)
        missing = [view for view, (path, _) in enumerate(places) if not _has_size(path, size + len(dataset))]
        in_memory = num_views * size <= self.config.feature_cache_gb * 1e9
        print(
            f"features of {num_views} view{'s' * (num_views > 1)} of {len(dataset)} images: "
            f"{format_bytes(num_views * size)}, {len(missing)} to be computed, in {self.config.cache_dir}/, "
            f"{'' if in_memory else 'not '}held in memory"
        )
        if missing:
            Path(self.config.cache_dir).mkdir(parents=True, exist_ok=True)
            remedy = "feature_views to fewer, or cache_features to False"
            check_disk_space(len(missing) * size, Path(self.config.cache_dir), remedy)
        views = []
        for view, (path, older) in enumerate(places):
            if view in missing:
                with replace_cache(path, replaces=older) as file:
                    self._write(dataset, view, num_views, file)
            # Shared: a private mapping would be counted as memory, and one larger than that refused.
            stored = torch.from_file(str(path), shared=True, size=size + len(dataset), dtype=torch.uint8)
            features = stored[:size].view(self.dtype).view(shape)
            dataset.unreadable.logical_or_(stored[size:].bool())
            views.append(features.clone() if in_memory else features)
        return FeatureDataset(views, dataset.images, dataset.seed)

    def _write(self, dataset: ImageDataset, view: int, num_views: int, file: BinaryIO) -> None:
        """Write the features of one view, then a byte an image: 1 if it couldn't be read."""
        plain = dataset.with_transform(EvalTransform(Preprocessing.from_config(self.config)))
        loader = eval_loader(dataset if view else plain, self._batch_size, self.config.num_workers)
        loader.sampler.epoch = view
        title = f"features, view {view + 1} of {num_views}"
        for pixels, _ in tqdm(iterate_batches(loader), title, len(loader), unit="batch", leave=False, disable=None):
            # A smaller batch would go through other kernels, which differ in the last bits from a whole one's.
            whole = pixels[torch.arange(loader.batch_size) % len(pixels)]
            file.write(self._compute(whole)[: len(pixels)].contiguous().view(torch.uint8).numpy())
        file.write(dataset.unreadable.to(torch.uint8).numpy())

    @torch.inference_mode()
    def _compute(self, pixels: Tensor) -> Tensor:
        with autocast(self.device, self.precision):
            return self.network.forward_frozen(pixels.to(self.device, non_blocking=True)).to(self.dtype).cpu()

    def _places(self, dataset: ImageDataset, list_path: str, num_views: int) -> list[tuple[Path, str]]:
        """For each view the file, and a glob of those whose place it takes."""
        model = self.network.model
        frozen = model.frozen_state()
        of_content = digest(
            [
                f"{self.precision} {self.device.type} {torch.__version__} {self._batch_size}",
                f"{model.arguments | {'num_classes': None}}",
                *(f"{field}={getattr(self.config, field)}" for field in IMAGE_FIELDS),
                dataset.class_ids.tobytes(),
                *describe_files(dataset.source.images, TRAINING_CODE),
                *(part for name, value in frozen.items() for part in (name, _bytes(value))),
            ]
        )
        places = []
        for view in range(num_views):
            of_list = digest([os.path.abspath(list_path), str(view), *frozen])
            path = Path(self.config.cache_dir, f"features-{of_list}-{of_content}.bin")
            places.append((path, f"features-{of_list}-*.bin"))
        return places


def _has_size(path: Path, size: int) -> bool:
    return path.is_file() and path.stat().st_size == size


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data
