"""Images per second of loading on one core: Thaw's training pipeline against torchvision's and timm's.

    python benchmarks/loader.py [--images FOLDER]

Each pipeline is a data loader without workers that returns batches at 224 pixels, with random crop, mirroring and
AutoAugment. The peers return normalized floats; Thaw returns uint8 and normalizes in the training step, which is timed
separately. The files are photos re-encoded as JPEG, quality 90, of 500 x 375 and 4032 x 3024 pixels. The pipelines take
turns. The last line is JSON.
"""

from __future__ import annotations

import dataclasses
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import tyro
from measure import medians, print_result, print_speeds, take_turns
from PIL import Image
from timm.data import create_transform
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from utils.annotation.folder_scan import find_images
from utils.config.train_config import TrainConfig
from utils.data.dataset import FileSource, ImageDataset
from utils.data.image_cache import open_cache
from utils.data.image_io import open_image
from utils.data.image_list import list_in_memory
from utils.data.loader import train_loader
from utils.data.preprocessing import Preprocessing, resolve_preprocessing
from utils.data.transforms import TrainTransform
from utils.modeling.pixel_network import Normalize

CONFIG = resolve_preprocessing(TrainConfig().with_defaults(), {})
BATCH = 20


class PeerDataset(Dataset):
    """Reads files as in the reference scripts of the peers: Pillow, RGB, transform."""

    def __init__(self, paths: list[str], transform: Callable) -> None:
        self.paths = paths
        self.transform = transform

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        with Image.open(self.paths[index]) as image:
            return self.transform(image.convert("RGB")), 0


def thaw_loader(paths: list[str]) -> DataLoader:
    """Thaw's training loader with defaults."""
    source = FileSource(list_in_memory((0, path) for path in paths), Preprocessing.from_config(CONFIG))
    return train_loader(ImageDataset(source, TrainTransform(CONFIG), seed=0), BATCH, num_workers=0)


def cached_loader(paths: list[str]) -> DataLoader:
    """The same, with `cache_images`."""
    config = dataclasses.replace(CONFIG, cache_images=True, cache_dir=str(Path(paths[0]).parent))
    source = open_cache(list_in_memory((0, path) for path in paths), config)
    return train_loader(ImageDataset(source, TrainTransform(config), seed=0), BATCH, num_workers=0)


def torchvision_loader(paths: list[str]) -> DataLoader:
    """torchvision's transforms as in its classification reference."""
    transform = v2.Compose(
        [
            v2.RandomResizedCrop(CONFIG.input_shape, antialias=True),
            v2.RandomHorizontalFlip(),
            v2.AutoAugment(),
            v2.PILToTensor(),
            v2.ToDtype(torch.float, scale=True),
            v2.Normalize(CONFIG.image_mean, CONFIG.image_std),
        ]
    )
    return DataLoader(PeerDataset(paths, transform), BATCH)


def timm_loader(paths: list[str]) -> DataLoader:
    """timm's training transform with its original AutoAugment policy."""
    transform = create_transform(CONFIG.input_shape, is_training=True, auto_augment="original")
    return DataLoader(PeerDataset(paths, transform), BATCH)


def make_images(source: str, folder: Path, size: tuple[int, int], count: int) -> list[str]:
    """Re-encode `count` images of `source` at `size`, as JPEG of quality 90."""
    files = find_images(source, Counter())
    paths = []
    for i in range(count):
        paths.append(str(folder / f"{size[0]}_{i:03d}.jpg"))
        open_image(files[i * len(files) // count]).resize(size, Image.Resampling.BICUBIC).save(paths[-1], quality=90)
    return paths


def load(loader: DataLoader) -> int:
    """Load all images; return their number."""
    return sum(len(targets) for _, targets in loader)


def normalize(module: Normalize, pixels: torch.Tensor) -> int:
    """Normalize a batch as in the training step; return its size."""
    return len(module(pixels))


def compare(title: str, loaders: dict[str, DataLoader], repeats: int) -> dict[str, float]:
    """Time the loaders in turn; print and return the median of each, in ms per image."""
    times = take_turns({name: partial(load, loader) for name, loader in loaders.items()}, repeats)
    print_speeds(title, times)
    return {name: 1000 * seconds for name, seconds in medians(times).items()}


def main(images: str = "../shared/data/trashnet", repeats: int = 9) -> None:
    """Compare the loaders.

    Args:
        images: folder of photos to make the files from.
        repeats: passes over the images, after a warm-up.
    """
    if not Path(images).is_dir():
        sys.exit(f"{images}: not found; set --images to a folder of photos")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        ordinary = make_images(images, folder, (500, 375), 5 * BATCH)
        large = make_images(images, folder, (4032, 3024), BATCH)
        loaders = {"torchvision": torchvision_loader, "timm": timm_loader, "thaw": thaw_loader}
        ordinary_loaders = {name: make(ordinary) for name, make in loaders.items()}
        ordinary_loaders["thaw, cached"] = cached_loader(ordinary)
        large_loaders = {name: make(large) for name, make in loaders.items()}
        ms = {
            "ordinary": compare("500x375", ordinary_loaders, repeats),
            "large": compare("4032x3024", large_loaders, repeats),
        }
    ratios = {
        f"{title}_vs_torchvision": round(ms[size]["torchvision"] / ms[size][loader], 2)
        for title, size, loader in (
            ("ordinary", "ordinary", "thaw"),
            ("large", "large", "thaw"),
            ("cached", "ordinary", "thaw, cached"),
        )
    }
    pixels = torch.zeros(BATCH, *CONFIG.input_shape, 3, dtype=torch.uint8).permute(0, 3, 1, 2)
    task = partial(normalize, Normalize(CONFIG.image_mean, CONFIG.image_std), pixels)
    normalizing = 1000 * medians(take_turns({"normalize": task}, 20))["normalize"]
    print(f"normalization in the training step, which the peers' times include: {normalizing:.2f} ms per image")
    print_result("loader", ratios=ratios, ms=ms, normalizing_ms=normalizing)


if __name__ == "__main__":
    tyro.cli(main)
