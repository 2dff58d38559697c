"""The stages of a run: which part of the network is frozen, for how long, in which batches, at which rate; and what
the frozen part makes of the pictures, computed once."""

from __future__ import annotations

import dataclasses
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor, nn
from tqdm import tqdm

from utils.cache_file import check_room, describe_files, digest, replace_cache
from utils.config import TrainConfig
from utils.data import FeatureDataset, ImageDataset, eval_loader, fetch
from utils.device import DTYPES, autocast
from utils.files import format_bytes
from utils.optim import batch_scale, learning_rate_at, scale_learning_rate
from utils.transforms import EvalTransform, Preprocessing


@dataclass(frozen=True)
class Stage:
    """The epochs from `start` to below `end`.

    Attributes:
        start: first epoch, counted from 0.
        end: the epoch after the last.
        frozen: how many blocks are frozen besides the embeddings, "all" (everything but the head), or "nothing".
        batch_size: pictures a step, no more than the training list has.
        input_shape: height and width of the pictures, in pixels.
        init_lr: highest learning rate, scaled by the batch size.
        min_lr: lowest learning rate, scaled likewise.
        run_epochs: epochs of the whole run, over which the learning rate falls.
        decay: how it falls, see `utils.optim.learning_rate_at`.
        warmup: epochs over which it rises first, from a tenth of what it would be.
    """

    start: int
    end: int
    frozen: int | str
    batch_size: int
    input_shape: tuple[int, int]
    init_lr: float
    min_lr: float
    run_epochs: int
    decay: str
    warmup: float = 0.0

    def freeze(self, model: nn.Module) -> None:
        """Freeze this stage's part of `model` and thaw the rest."""
        if self.frozen == "nothing":
            model.unfreeze_backbone()
        else:
            model.freeze_backbone(self.frozen)

    def learning_rate(self, epoch: float) -> float:
        """The learning rate after `epoch` epochs of the run, fractions included."""
        rate = learning_rate_at(epoch, self.run_epochs, self.init_lr, self.min_lr, self.decay)
        done = epoch - self.start
        return rate * (0.1 + 0.9 * done / self.warmup) if done < self.warmup else rate


def plan_stages(config: TrainConfig, num_pictures: int, transformer: bool) -> list[Stage]:
    """The stages that `config` asks for. What had to be changed to fit is printed.

    Args:
        config: the settings.
        num_pictures: length of the training list.
        transformer: whether the backbone is one, whose learning rate is scaled otherwise.
    """
    stages: list[Stage] = []
    for wanted in config.all_stages:
        batch_size = min(wanted.batch_size, num_pictures)
        if batch_size < wanted.batch_size:
            print(f"batch size: {wanted.batch_size} -> {batch_size}, the training list has no more pictures")
        start = stages[-1].end if stages else 0
        rates = scale_learning_rate(config, batch_size, transformer)
        asked = config.init_lr * batch_scale(batch_size, transformer)
        if not math.isclose(rates[0], asked):
            print(
                f"init_lr: {config.init_lr:g} is {asked:.2g} a step of {batch_size} pictures -> {rates[0]:.2g}, the "
                f"limit for {config.optimizer_type}"
            )
        falling = (config.epochs, config.lr_decay_type, config.thaw_warmup if stages else 0)
        trained = (wanted.frozen, batch_size, wanted.input_shape)
        stages.append(Stage(start, start + wanted.epochs, *trained, *rates, *falling))
    return stages


class FrozenPart(nn.Module):
    """What stands before the freezing point: pixels (B, 3, height, width) uint8 to features (B, N, C).

    Args:
        network: of `utils.classifier.pixel_network`.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.normalise, self.model = network

    def forward(self, pixels: Tensor) -> Tensor:
        return self.model.forward_frozen(self.normalise(pixels))


class ThawedPart(nn.Module):
    """What stands behind it: features (B, N, C) to logits (B, classes)."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        _, self.model = network

    def forward(self, features: Tensor) -> Tensor:
        return self.model.forward_thawed(features.float())


def num_cached_views(stage: Stage, config: TrainConfig) -> int:
    """How many views of each picture `stage` has the features of computed beforehand; 0: it trains on the pictures.

    A stage with no more epochs than views does, for it computes no more without.
    """
    if stage.frozen == "nothing" or not config.cache_features or stage.end - stage.start <= config.feature_views:
        return 0
    return config.feature_views


# What features depend on, besides the pictures and the frozen weights.
SHAPING_FIELDS = (
    *(field.name for field in dataclasses.fields(Preprocessing)),
    *("train_crop", "horizontal_flip", "color_jitter", "augmentation", "random_erasing"),
    *("cache_images", "max_bad_fraction", "seed"),
)


LARGEST_BATCH = 64
"""Pictures that go through the frozen part at a time, at most."""


class FeatureCache:
    """What the frozen part of a network makes of pictures, computed once and kept in files in `cache_dir`.

    A file is named after all that its features depend on: the list and its files, the frozen weights, the transforms,
    the arithmetic. If one of them changes, another takes its place.

    Args:
        network: of `utils.classifier.pixel_network`, as far frozen as it shall be when `open` is called.
        config: the settings.
        device: where the network is.
        precision: of the computation and of the file: "fp32", "fp16" or "bf16".
    """

    def __init__(self, network: nn.Module, config: TrainConfig, device: torch.device, precision: str) -> None:
        self.frozen = FrozenPart(network)
        self.config = config
        self.device = device
        self.precision = precision
        self.dtype = DTYPES[precision]
        # That of training as far as it can be, so that the same kernels give the same bits; heads take far larger ones.
        self._batch_size = min(config.all_stages[0].batch_size, LARGEST_BATCH)

    def open(self, dataset: ImageDataset, list_path: str, num_views: int) -> FeatureDataset:
        """The features of `num_views` views of each picture: the first as in evaluation, the others as the dataset
        transforms them. Up to `feature_cache_gb` they are held in memory, beyond they are read when they are needed.

        Args:
            dataset: the pictures. Those that couldn't be read when the features were computed are marked in it.
            list_path: the list that they are from; features of an earlier state of it are removed.
            num_views: 1 or more.

        Raises:
            ValueError: there isn't room enough.
            TooManyUnreadable: see `utils.data.ImageDataset`.
        """
        blank = torch.zeros(1, 3, *self.config.input_shape, dtype=torch.uint8)
        shape = (num_views, len(dataset), *self._compute(blank).shape[1:])
        size = math.prod(shape) * self.dtype.itemsize
        path, older = self._place(dataset, list_path, num_views)
        in_memory = size <= self.config.feature_cache_gb * 1e9
        print(
            f"features of {num_views} view{'s' * (num_views > 1)} of {len(dataset)} pictures: {format_bytes(size)}, "
            f"{'from' if path.is_file() else 'computed into'} {path}, {'' if in_memory else 'not '}held in memory"
        )
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            check_room(size, path.parent, "feature_views to fewer, or cache_features to False")
            with replace_cache(path, replaces=older) as file:
                self._write(dataset, num_views, file)
        # Shared: a private mapping would be counted as memory, and one larger than that refused.
        stored = torch.from_file(str(path), shared=True, size=size + len(dataset), dtype=torch.uint8)
        features = stored[:size].view(self.dtype).view(shape)
        dataset.unreadable.logical_or_(stored[size:].bool())
        return FeatureDataset(features.clone() if in_memory else features, dataset.images, dataset.seed)

    def _write(self, dataset: ImageDataset, num_views: int, file: BinaryIO) -> None:
        """Write the features, view by view, then a byte a picture: 1 if it couldn't be read."""
        plain = dataset.with_transform(EvalTransform(Preprocessing.from_dict(self.config.as_dict())))
        total = num_views * len(dataset)
        with tqdm(total=total, desc="features", unit="picture", leave=False, disable=None) as bar:
            for view in range(num_views):
                loader = eval_loader(dataset if view else plain, self._batch_size, self.config.num_workers)
                loader.sampler.epoch = view
                for pixels, _ in fetch(loader):
                    # A smaller batch would go through other kernels, which differ in the last bits from a whole one's.
                    whole = pixels[torch.arange(loader.batch_size) % len(pixels)]
                    file.write(self._compute(whole)[: len(pixels)].contiguous().view(torch.uint8).numpy())
                    bar.update(len(pixels))
        file.write(dataset.unreadable.to(torch.uint8).numpy())

    @torch.inference_mode()
    def _compute(self, pixels: Tensor) -> Tensor:
        with autocast(self.device, self.precision):
            return self.frozen(pixels.to(self.device, non_blocking=True)).to(self.dtype).cpu()

    def _place(self, dataset: ImageDataset, list_path: str, num_views: int) -> tuple[Path, str]:
        """The file, and a glob of those whose place it takes."""
        model = self.frozen.model
        frozen = model.frozen_state()
        of_list = digest([os.path.abspath(list_path), str(num_views), *frozen])
        of_content = digest(
            [
                f"{self.precision} {self.device.type} {torch.__version__} {self._batch_size}",
                f"{model.arguments | {'num_classes': None}}",
                *(f"{field}={getattr(self.config, field)}" for field in SHAPING_FIELDS),
                dataset.class_ids.tobytes(),
                *describe_files(dataset.source.images),
                *(part for name, value in frozen.items() for part in (name, _bytes(value))),
            ]
        )
        return Path(self.config.cache_dir, f"features-{of_list}-{of_content}.bin"), f"features-{of_list}-*.bin"


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data
