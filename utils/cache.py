"""The pictures of a list, shrunk once to what training needs and kept decoded in one file."""

from __future__ import annotations

import hashlib
import math
import os
import shutil
import time
from contextlib import suppress
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
from PIL import Image

from utils.config import TrainConfig
from utils.images import Box, ImageError, Region, read_header, read_region
from utils.lists import ImageList
from utils.parallel import map_parallel
from utils.transforms import Transform

STRAY_AFTER = 3600
"""Seconds without a write after which a half-made cache was left by a process that is gone."""
SAMPLE = 200
"""Pictures whose headers are read to say how large the file will be."""


class ImageCache:
    """Pictures out of one memory-mapped file, in place of `utils.data.FileSource`.

    Attributes:
        images: the list.
        path: the file of pixels, uint8 RGB, one picture after the other.
        index: (n, 5) int64, for each picture where it begins, its height and width there, and the height and width of
            the upright original; nought where the original couldn't be read.
    """

    def __init__(self, images: ImageList, path: Path, index: np.ndarray) -> None:
        self.images = images
        self.path = path
        self.index = index
        self._pixels: np.ndarray | None = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_pixels": None}  # a worker that is spawned maps the file anew

    def region(self, index: int, transform: Transform) -> Region:
        """The part of a picture that `transform` wants: the same part as without the cache.

        Raises:
            ImageError: the original couldn't be read when the cache was made.
        """
        start, height, width, full_height, full_width = self.index[index].tolist()
        if not height:
            raise ImageError.of(self.images.path(index), "it couldn't be read when the cache was made")
        if self._pixels is None:
            self._pixels = np.memmap(self.path, np.uint8, mode="c")
        left, top, right, bottom = transform.choose_box(full_width, full_height)
        across, down = width / full_width, height / full_height
        pixels = self._pixels[start : start + height * width * 3].reshape(height, width, 3)
        return Region(pixels, (left * across, top * down, right * across, bottom * down))


def open_cache(images: ImageList, config: TrainConfig) -> ImageCache:
    """The cache of a list, made first where there is none or any of the files has changed since.

    Raises:
        ValueError: there isn't room enough.
    """
    folder = Path(config.cache_dir)
    folder.mkdir(parents=True, exist_ok=True)
    height, width = config.input_shape
    name = hashlib.sha256(os.path.abspath(config.train_annotation_path).encode("utf-8", "surrogateescape")).hexdigest()
    path = folder / f"images-{name[:12]}-{height}x{width}.bin"
    digest = _digest(images, config)
    index = _read_index(path, digest)
    if index is None:
        _check_room(images, config, path)
        index = _write(images, config, path, digest)
    lost = int((index[:, 1] == 0).sum())
    print(f"pictures from {path} ({_gigabytes(path.stat().st_size)}){f', but for {lost} unreadable' if lost else ''}")
    return ImageCache(images, path, index)


def cached_size(height: int, width: int, config: TrainConfig) -> tuple[int, int]:
    """Height and width to which a picture is shrunk: a random crop of middling area is then of `input_shape`."""
    middling = (1 + config.train_crop) / 2
    factor = max(config.input_shape[0] / height, config.input_shape[1] / width) / math.sqrt(middling)
    return (height, width) if factor >= 1 else (round(height * factor), round(width * factor))


def _shrink(path: str, config: TrainConfig) -> tuple[np.ndarray, int, int] | None:
    """The shrunk picture (height, width, 3), and the height and width of the original; None if it can't be read."""
    full, small = (0, 0), (0, 0)

    def choose(width: int, height: int) -> tuple[Box, tuple[int, int]]:
        nonlocal full, small
        full, small = (height, width), cached_size(height, width, config)
        return (0, 0, width, height), small

    try:
        pixels = read_region(path, choose, config.max_pixels, config.allow_truncated).pixels
    except ImageError:
        return None
    return np.asarray(Image.fromarray(pixels).resize(small[::-1], Image.Resampling.BILINEAR)), *full


def _write(images: ImageList, config: TrainConfig, path: Path, digest: str) -> np.ndarray:
    """Make the cache, aside and then renamed, so that what has its name is whole; return its index."""
    index = np.zeros((len(images), 5), np.int64)
    for stray in path.parent.glob("*.partial"):
        if time.time() - stray.stat().st_mtime > STRAY_AFTER:
            stray.unlink(missing_ok=True)
    partial = path.with_name(f"{path.stem}-{os.getpid()}.partial")

    def shrink(i: int) -> tuple[np.ndarray, int, int] | None:
        return _shrink(images.path(i), config)

    try:
        with partial.open("wb") as file:
            for i, shrunk in enumerate(map_parallel(shrink, range(len(images)), "shrinking pictures")):
                index[i, 0] = file.tell()
                if shrunk is not None:
                    pixels, *full = shrunk
                    index[i, 1:] = *pixels.shape[:2], *full
                    file.write(pixels.tobytes())
        path.with_suffix(".npz").unlink(missing_ok=True)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    np.savez(path.with_suffix(".npz"), index=index, digest=np.array(digest), size=path.stat().st_size)
    return index


def _read_index(path: Path, digest: str) -> np.ndarray | None:
    """The index of a cache that is whole and made of the same files, else None."""
    try:
        with np.load(path.with_suffix(".npz"), allow_pickle=False) as held:
            same = str(held["digest"]) == digest and int(held["size"]) == path.stat().st_size
            return held["index"] if same else None
    except (OSError, ValueError, KeyError, BadZipFile):
        return None


def _digest(images: ImageList, config: TrainConfig) -> str:
    """Changes with the paths, with size or time of any of the files, and with the settings that shape the pictures."""
    fields = ("input_shape", "train_crop", "max_pixels", "allow_truncated")
    digest = hashlib.sha256(repr([getattr(config, field) for field in fields]).encode())
    for i in range(len(images)):
        path = images.path(i)
        digest.update(os.fsencode(path))
        try:
            status = os.stat(path)
            digest.update(b";%d;%d\n" % (status.st_size, status.st_mtime_ns))
        except OSError:
            digest.update(b";missing\n")
    return digest.hexdigest()


def _check_room(images: ImageList, config: TrainConfig, path: Path) -> None:
    """Say how large the file will be, by the headers of some pictures."""
    chosen = range(0, len(images), max(1, len(images) // SAMPLE))
    pixels = []
    for i in chosen:
        with suppress(ImageError):
            header = read_header(images.path(i), config.max_pixels)
            pixels.append(math.prod(cached_size(header.height, header.width, config)))
    expected = int(3 * len(images) * sum(pixels) / max(len(pixels), 1))
    free = shutil.disk_usage(path.parent).free
    print(f"cache_images: shrinking {len(images)} pictures into {path}, about {_gigabytes(expected)}")
    if expected > 0.95 * free:
        raise ValueError(
            f"cache_dir={str(path.parent)!r}: the cache takes about {_gigabytes(expected)} and {_gigabytes(free)} are "
            f"free; set cache_dir to another disk, or cache_images to False"
        )


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.2f} GB"
