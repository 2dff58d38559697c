"""A cache of decoded images, downscaled once to the resolution that training needs, in one file."""

from __future__ import annotations

import math
import os
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from PIL import Image

from utils.config.train_config import TrainConfig
from utils.data.cache_file import CHECKSUM, check_disk_space, describe_files, is_intact, replace_cache
from utils.data.image_io import Box, ImageError, Region, open_to_decode, read_size, scale_box
from utils.data.image_list import ImageList
from utils.data.retry import read_patiently
from utils.system.digests import IMAGE_CODE, digest
from utils.system.files import format_bytes, make_folder
from utils.system.runtime import runtime
from utils.system.text import count_of
from utils.system.thread_map import map_parallel

INDEX_ROW = 5 * 8
"""Bytes per image in the index."""
SAMPLE = 200
"""Images whose headers are read to estimate the size of the file."""


class ImageCache:
    """Images in one memory-mapped file: a `utils.data.dataset.Source`.

    The file holds the uint8 RGB pixels of all images, followed by the index, int64 (n, 5): offset, cached height and
    width, and height and width of the upright original. All sizes of unreadable images are 0.
    """

    def __init__(self, images: ImageList, path: Path) -> None:
        self.images = images
        self.path = path
        self._map()

    def _map(self) -> None:
        self._bytes = np.memmap(self.path, np.uint8, mode="r+")[:-CHECKSUM]
        self.index = self._bytes[len(self._bytes) - len(self.images) * INDEX_ROW :].view(np.int64).reshape(-1, 5)

    def __getstate__(self) -> dict[str, Any]:
        return {"images": self.images, "path": self.path}  # spawned workers map the file again

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state
        self._map()

    def open(self, index: int) -> AbstractContextManager[CachedImage]:
        """See `utils.data.dataset.Source`."""
        start, height, width, full_height, full_width = self.index[index].tolist()
        if not height:
            raise ImageError.of(self.images.path(index), f"it was unreadable when {self.path} was written")
        pixels = self._bytes[start : start + height * width * 3].reshape(height, width, 3)
        return nullcontext(CachedImage(pixels, full_width, full_height))


class CachedImage(NamedTuple):
    """A cached image, decoded like a file.

    Attributes:
        pixels: uint8 (height, width, 3), downscaled.
        width: of the upright original.
        height: of the upright original.
    """

    pixels: np.ndarray
    width: int
    height: int

    def decode(self, box: Box, size: tuple[int, int]) -> Region:
        """See `utils.data.image_io.OpenImage.decode`."""
        return scale_box(self.pixels, box, self.width, self.height)


def open_cache(images: ImageList, config: TrainConfig) -> ImageCache:
    """Open the cache of a list; write it first if it is missing, or if a file, a setting or the code has changed.

    Raises:
        ValueError: the disk doesn't have enough space.
        ImagesGone: most images are missing.
    """
    path = runtime.first(lambda: _write_missing(images, config))
    cache = ImageCache(images, path)
    unreadable = int((cache.index[:, 1] == 0).sum())
    suffix = f", {unreadable} unreadable" if unreadable else ""
    print(f"images from {path} ({format_bytes(path.stat().st_size)}){suffix}")
    return cache


def _write_missing(images: ImageList, config: TrainConfig) -> Path:
    """The path of the cache of a list, which is written if necessary."""
    folder = Path(config.cache_dir)
    make_folder(folder)
    list_digest = digest([os.path.abspath(config.train_annotation_path), str(config.input_shape)])
    fields = ("input_shape", "train_crop", "max_pixels", "allow_truncated")
    content_digest = digest([*(str(getattr(config, field)) for field in fields), *describe_files(images, IMAGE_CODE)])
    path = folder / f"images-{list_digest}-{content_digest}.bin"
    if not _is_complete(path, len(images)):
        expected = _expected_size(images, config)
        print(f"cache_images: writing {count_of(len(images), 'image')} to {path}, about {format_bytes(expected)}")
        check_disk_space(expected, folder, "cache_images to False")
        with replace_cache(path, replaces=f"images-{list_digest}-*.bin") as file:
            _write(images, config, file)
    return path


def _is_complete(path: Path, num_images: int) -> bool:
    """Return whether the file holds `num_images` images, and all pixels that its index refers to."""
    if not is_intact(path):
        return False
    index_start = path.stat().st_size - CHECKSUM - num_images * INDEX_ROW
    if index_start < 0:
        return False
    values = np.fromfile(path, np.int64, num_images * 5, offset=index_start).reshape(num_images, 5)
    start, height, width, *_ = values.T
    return bool((values >= 0).all() and (start + height * width * 3 <= index_start).all())


def cached_size(height: int, width: int, config: TrainConfig) -> tuple[int, int]:
    """Return the cached height and width: a random crop of mean area then has the size `input_shape`."""
    mean_area = (1 + config.train_crop) / 2
    factor = max(config.input_shape[0] / height, config.input_shape[1] / width) / math.sqrt(mean_area)
    return (height, width) if factor >= 1 else (round(height * factor), round(width * factor))


def _downscale(path: str, config: TrainConfig) -> tuple[np.ndarray, int, int]:
    """Return cached pixels (height, width, 3), and the original's height and width."""
    with open_to_decode(path, config.max_pixels, config.allow_truncated) as image:
        width, height = image.width, image.height
        size = cached_size(height, width, config)
        pixels = image.decode((0, 0, width, height), size).pixels
    return np.asarray(Image.fromarray(pixels).resize(size[::-1], Image.Resampling.BILINEAR)), height, width


def _write(images: ImageList, config: TrainConfig, file: BinaryIO) -> None:
    """Write all images, then the index."""
    index = np.zeros((len(images), 5), np.int64)

    def downscale(i: int) -> tuple[np.ndarray, int, int] | None:
        try:
            return read_patiently(lambda: _downscale(images.path(i), config), len(images), images.path)
        except ImageError:
            return None

    for i, image in enumerate(map_parallel(downscale, range(len(images)), "writing the image cache")):
        index[i, 0] = file.tell()
        if image is not None:
            pixels, *original_size = image
            index[i, 1:] = *pixels.shape[:2], *original_size
            file.write(pixels.tobytes())
    file.write(bytes(-file.tell() % index.itemsize))
    file.write(index.tobytes())


def _expected_size(images: ImageList, config: TrainConfig) -> int:
    """Estimate the size of the file in bytes from the headers of some images."""
    pixels = []
    for i in range(0, len(images), max(1, len(images) // SAMPLE)):
        with suppress(ImageError):
            width, height = read_size(images.path(i), config.max_pixels)
            pixels.append(math.prod(cached_size(height, width, config)))
    return int(3 * len(images) * sum(pixels) / max(len(pixels), 1))
