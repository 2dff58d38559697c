"""The images that a run learns from and is validated on."""

from __future__ import annotations

from typing import NamedTuple

from utils.annotation.annotate import ensure_lists
from utils.config.train_config import TrainConfig
from utils.data.dataset import FileSource, ImageDataset
from utils.data.image_cache import open_cache
from utils.data.image_list import ImageList, read_classes, read_list
from utils.data.preprocessing import Preprocessing
from utils.data.transforms import EvalTransform, TrainTransform
from utils.training.summary import warn_of_input_shape


class Data(NamedTuple):
    """What the lists say."""

    class_names: list[str]
    train_images: ImageList
    val_images: ImageList


def load_data(config: TrainConfig) -> Data:
    """Read the lists; make them first where that is clearly wanted."""
    ensure_lists(config)
    class_names = read_classes(config.classes_path)
    train_images = read_list(config.train_annotation_path, len(class_names))
    val_images = read_list(config.val_annotation_path, len(class_names))
    print(f"{len(train_images)} training and {len(val_images)} validation images, {len(class_names)} classes")
    warn_of_input_shape(train_images, config.input_shape, config.max_pixels)
    return Data(class_names, train_images, val_images)


def make_datasets(data: Data, config: TrainConfig) -> tuple[ImageDataset, ImageDataset]:
    """The images to train on, augmented, and those to validate on."""
    preprocessing = Preprocessing.of(config)
    files, val_files = FileSource(data.train_images, preprocessing), FileSource(data.val_images, preprocessing)
    source = open_cache(data.train_images, config) if config.cache_images else files
    train_set = ImageDataset(source, TrainTransform(config), config.seed, config.max_bad_fraction)
    val_set = ImageDataset(val_files, EvalTransform(preprocessing), config.seed, config.max_bad_fraction)
    return train_set, val_set


def report_unreadable(*datasets: ImageDataset) -> None:
    """Name the images that couldn't be read and weren't named after an earlier epoch."""
    for dataset in datasets:
        if new := dataset.newly_unreadable():
            shown = ", ".join(new[:10]) + (f" and {len(new) - 10} more" if len(new) > 10 else "")
            print(f"warning: {len(new)} unreadable, others of their class stood in: {shown}")
