"""Images a second on one core: Thaw's training pipeline against torchvision's and timm's, on the same files in turn.

    python benchmarks/loader.py [--images FOLDER]

Each pipeline is a data loader without workers that gives whole batches at 224 pixels, with random crop, mirroring and
AutoAugment. The peers give normalised floats; Thaw gives uint8 and normalises on the device, inside the training step,
and what that costs on the same core is measured apart. Real photos are re-encoded as JPEG of 500 x 375 and of
4032 x 3024 pixels, quality 90. The last line is JSON.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import tyro
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
    """Files as the peers' own references read them: Pillow, RGB, then the transform."""

    def __init__(self, paths: list[str], transform: Callable) -> None:
        self.paths = paths
        self.transform = transform

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        with Image.open(self.paths[index]) as image:
            return self.transform(image.convert("RGB")), 0


def thaw_loader(paths: list[str]) -> DataLoader:
    """Thaw's training loader, with its defaults."""
    source = FileSource(list_in_memory((0, path) for path in paths), Preprocessing.from_config(CONFIG))
    return train_loader(ImageDataset(source, TrainTransform(CONFIG), seed=0), BATCH, num_workers=0)


def cached_loader(paths: list[str]) -> DataLoader:
    """The same, with `cache_images`."""
    config = dataclasses.replace(CONFIG, cache_images=True, cache_dir=str(Path(paths[0]).parent))
    source = open_cache(list_in_memory((0, path) for path in paths), config)
    return train_loader(ImageDataset(source, TrainTransform(config), seed=0), BATCH, num_workers=0)


def torchvision_loader(paths: list[str]) -> DataLoader:
    """torchvision's transforms, as its classification reference puts them together."""
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
    """timm's training transform with its usual AutoAugment policy."""
    transform = create_transform(CONFIG.input_shape, is_training=True, auto_augment="original")
    return DataLoader(PeerDataset(paths, transform), BATCH)


def make_images(source: str, folder: Path, size: tuple[int, int], count: int) -> list[str]:
    """Re-encode `count` images of `source` at `size`, as JPEG of quality 90."""
    found = find_images(source, Counter())
    paths = []
    for i in range(count):
        paths.append(str(folder / f"{size[0]}_{i:03d}.jpg"))
        open_image(found[i * len(found) // count]).resize(size, Image.Resampling.BICUBIC).save(paths[-1], quality=90)
    return paths


def milliseconds(loader: DataLoader) -> float:
    """Of one pass over `loader`, an image."""
    started = time.perf_counter()
    count = sum(len(targets) for _, targets in loader)
    return (time.perf_counter() - started) / count * 1000


def milliseconds_to_normalise() -> float:
    """What Thaw does inside the training step, where the peers do it while loading, an image on this core."""
    normalise = Normalize(CONFIG.image_mean, CONFIG.image_std)
    pixels = torch.zeros(BATCH, *CONFIG.input_shape, 3, dtype=torch.uint8).permute(0, 3, 1, 2)
    times = []
    for _ in range(20):
        started = time.perf_counter()
        normalise(pixels)
        times.append((time.perf_counter() - started) / BATCH * 1000)
    return statistics.median(times)


def compare(title: str, loaders: dict[str, DataLoader], repeats: int) -> dict[str, float]:
    """Run the loaders in turn; print and return the median of each, in ms an image."""
    times: dict[str, list[float]] = {name: [] for name in loaders}
    for loader in loaders.values():
        milliseconds(loader)
    for _ in range(repeats):
        for name, loader in loaders.items():
            times[name].append(milliseconds(loader))
    medians = {name: statistics.median(values) for name, values in times.items()}
    for name, values in times.items():
        print(
            f"{title:<12}{name:<16}{1000 / medians[name]:8.0f} images/s, {medians[name]:6.2f} ms "
            f"({min(values):.2f} to {max(values):.2f}), {medians['torchvision'] / medians[name]:5.2f} x torchvision",
            flush=True,
        )
    return medians


def main(images: str = "../shared/data/trashnet", repeats: int = 9) -> None:
    """Compare loaders.

    Args:
        images: a folder of photos to make the images of.
        repeats: passes over the images; the median counts.
    """
    if not Path(images).is_dir():
        sys.exit(f"there is no folder {images}: give one with photos, --images FOLDER")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        ordinary = make_images(images, folder, (500, 375), 5 * BATCH)
        large = make_images(images, folder, (4032, 3024), BATCH)
        loaders = {"torchvision": torchvision_loader, "timm": timm_loader, "thaw": thaw_loader}
        of_ordinary = {name: make(ordinary) for name, make in loaders.items()}
        of_ordinary["thaw, cached"] = cached_loader(ordinary)
        of_large = {name: make(large) for name, make in loaders.items()}
        medians = {
            "ordinary": compare("500x375", of_ordinary, repeats),
            "large": compare("4032x3024", of_large, repeats),
        }
    ratios = {
        f"{title}_vs_torchvision": round(medians[kind]["torchvision"] / medians[kind][loader], 2)
        for title, kind, loader in (
            ("ordinary", "ordinary", "thaw"),
            ("large", "large", "thaw"),
            ("cached", "ordinary", "thaw, cached"),
        )
    }
    normalising = milliseconds_to_normalise()
    print(f"normalising an image, in the training step: {normalising:.2f} ms, which the peers' times include")
    print(json.dumps({"benchmark": "loader", "ratios": ratios, "ms": medians, "normalising_ms": normalising}))


if __name__ == "__main__":
    tyro.cli(main)
