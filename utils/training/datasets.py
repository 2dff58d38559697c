"""The images that a run trains and validates on, and the batches of each of its stages."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from utils.config.train_config import TrainConfig
from utils.data.dataset import FileSource, ImageDataset
from utils.data.image_cache import open_cache
from utils.data.image_list import ImageList, read_classes, read_list
from utils.data.loader import eval_loader, train_loader
from utils.data.preprocessing import Preprocessing
from utils.data.transforms import EvalTransform, TrainTransform
from utils.modeling.build import at_current_size
from utils.modeling.pixel_network import PixelNetwork, ThawedPart
from utils.system.runtime import runtime
from utils.system.text import count_of, shorten_list
from utils.training.feature_cache import FeatureCache
from utils.training.parts import Parts
from utils.training.stages import Stage, num_cached_views


class Data(NamedTuple):
    """The class names and lists of a run."""

    class_names: list[str]
    train_images: ImageList
    val_images: ImageList


def load_data(config: TrainConfig) -> Data:
    """Read the lists and the class file, whose paths are set, and warn about classes without images."""
    class_names = read_classes(config.classes_path)
    paths = (config.train_annotation_path, config.val_annotation_path)
    lists = [read_list(path, len(class_names)) for path in paths]
    for path, images, consequence in zip(paths, lists, ("can't be learned", "aren't validated"), strict=True):
        counts = np.bincount(images.class_ids, minlength=len(class_names))
        if missing := [name for name, count in zip(class_names, counts, strict=True) if not count]:
            print(f"warning: {path} has no images of {shorten_list(missing)}, which {consequence}")
    return Data(class_names, *lists)


def make_datasets(data: Data, config: TrainConfig) -> tuple[ImageDataset, ImageDataset]:
    """The training images, augmented, and the validation images."""
    preprocessing = Preprocessing.from_config(config)
    files, val_files = FileSource(data.train_images, preprocessing), FileSource(data.val_images, preprocessing)
    source = open_cache(data.train_images, config) if config.cache_images else files
    train_set = ImageDataset(source, TrainTransform(config), config.seed, config.max_bad_fraction)
    val_set = ImageDataset(val_files, EvalTransform(preprocessing), config.seed, config.max_bad_fraction)
    return train_set, val_set


class StageInputs:
    """The images of a run at the current input shape of its network, and the batches of its stages."""

    def __init__(
        self, config: TrainConfig, data: Data, network: PixelNetwork, device: torch.device, precision: str
    ) -> None:
        self.config = at_current_size(config, network.model)
        self.data = data
        self.network = network
        self.train_set, self.val_set = make_datasets(data, self.config)
        self.cache = FeatureCache(network, self.config, device, precision)

    def renewed(self, network: PixelNetwork) -> StageInputs:
        """The same images for a new network, or for the same one at its new input shape."""
        new = StageInputs(self.config, self.data, network, self.cache.device, self.cache.precision)
        new.train_set.share_unreadable(self.train_set)
        new.val_set.share_unreadable(self.val_set)
        return new

    def open(self, stage: Stage, parts: Parts, exact: bool, sharded: bool) -> tuple[nn.Module, DataLoader, DataLoader]:
        """The module that `stage` trains (the whole network on images, or its thawed part on cached features), and its
        training and validation batches. A network that is divided between ranks trains on images.

        `parts`, `exact` and `sharded` are those of the `Trainer`.
        """
        config = self.config
        network, train_set, val_set = self.network, self.train_set, self.val_set
        num_workers = config.num_workers
        num_views = 0 if sharded else num_cached_views(stage, config)
        if num_views:
            if config.mixup or config.cutmix:
                print("mixup and cutmix: not applied in this stage, which trains on cached features")
            train_set = self.cache.open(train_set, config.train_annotation_path, num_views)
            val_set = self.cache.open(val_set, config.val_annotation_path, num_views=1)
            network, num_workers = ThawedPart(network), 0
        if config.torch_compile:
            network = torch.compile(network)
        if runtime.world_size > 1 and not sharded and not exact:
            network = DistributedDataParallel(network, broadcast_buffers=False)  # anew, since it skips frozen weights
        rows = parts.rows(stage.batch_size)
        loader = train_loader(train_set, stage.batch_size, num_workers, config.sampler, rows, config.epoch_repeats)
        return network, loader, eval_loader(val_set, stage.batch_size, num_workers)

    def report_unreadable(self) -> None:
        """Print the images that couldn't be read and weren't printed before."""
        for dataset in (self.train_set, self.val_set):
            dataset.share_between_ranks()
            if new := dataset.newly_unreadable():
                shown = shorten_list(new, 10)
                print(f"warning: {count_of(len(new), 'unreadable image')}, replaced by others of the class: {shown}")
