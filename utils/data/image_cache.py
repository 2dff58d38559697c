"""The images of a list, shrunk once to what training needs and kept decoded in one file."""

from __future__ import annotations

import math
import os
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from PIL import Image

from utils.config.train_config import TrainConfig
from utils.data.cache_file import check_room, describe_files, replace_cache
from utils.data.image_io import Box, ImageError, Region, open_to_decode, read_size, scale_box
from utils.data.image_list import ImageList
from utils.system.digests import IMAGE_CODE, digest
from utils.system.files import format_bytes
from utils.system.thread_map import map_parallel

INDEX_ROW = 5 * 8
"""Bytes of the index for each image."""
SAMPLE = 200
"""Images whose headers are read to say how large the file will be."""


class ImageCache:
    """Images out of one memory-mapped file, in place of `utils.data.dataset.FileSource`.

    The file has the pixels, uint8 RGB, one image after the other, and then the index: int64 (n, 5), for each image
    where it begins, its height and width there, and the height and width of the upright original; nought where that
    couldn't be read.

    Args:
        images: the list.
        path: the file, whose name changes with all that is in it.
    """

    def __init__(self, images: ImageList, path: Path) -> None:
        self.images = images
        self.path = path
        self._map()

    def _map(self) -> None:
        self._bytes = np.memmap(self.path, np.uint8, mode="r+")
        self.index = self._bytes[len(self._bytes) - len(self.images) * INDEX_ROW :].view(np.int64).reshape(-1, 5)

    def __getstate__(self) -> dict[str, Any]:
        return {"images": self.images, "path": self.path}  # a worker that is spawned maps the file anew

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state
        self._map()

    def open(self, index: int) -> AbstractContextManager[CachedImage]:
        """See `utils.data.dataset.Source`.

        Raises:
            ImageError: the original couldn't be read when the cache was made.
        """
        start, height, width, full_height, full_width = self.index[index].tolist()
        if not height:
            raise ImageError.of(self.images.path(index), f"it couldn't be read when {self.path} was made")
        pixels = self._bytes[start : start + height * width * 3].reshape(height, width, 3)
        return nullcontext(CachedImage(pixels, full_width, full_height))


class CachedImage(NamedTuple):
    """An image out of the cache, which gives the same parts as its file.

    Attributes:
        pixels: uint8 (height, width, 3), shrunk.
        width: of the upright original, in pixels.
        height: likewise.
    """

    pixels: np.ndarray
    width: int
    height: int

    def decode(self, box: Box, size: tuple[int, int]) -> Region:
        """See `utils.data.image_io.OpenImage.decode`."""
        return scale_box(self.pixels, box, self.width, self.height)


def open_cache(images: ImageList, config: TrainConfig) -> ImageCache:
    """The cache of a list, made first where there is none or any of the files has changed since.

    Raises:
        ValueError: there isn't room enough.
    """
    folder = Path(config.cache_dir)
    folder.mkdir(parents=True, exist_ok=True)
    of_list = digest([os.path.abspath(config.train_annotation_path), str(config.input_shape)])
    fields = ("input_shape", "train_crop", "max_pixels", "allow_truncated")
    of_content = digest([*(str(getattr(config, field)) for field in fields), *describe_files(images, IMAGE_CODE)])
    path = folder / f"images-{of_list}-{of_content}.bin"
    if not _is_whole(path, len(images)):
        expected = _expected_size(images, config)
        print(f"cache_images: shrinking {len(images)} images into {path}, about {format_bytes(expected)}")
        check_room(expected, folder, "cache_images to False")
        with replace_cache(path, replaces=f"images-{of_list}-*.bin") as file:
            _write(images, config, file)
    cache = ImageCache(images, path)
    lost = int((cache.index[:, 1] == 0).sum())
    print(f"images from {path} ({format_bytes(path.stat().st_size)}){f', but for {lost} unreadable' if lost else ''}")
    return cache


def _is_whole(path: Path, num_images: int) -> bool:
    """Whether there is a cache of so many images, with all that its index says."""
    room = path.stat().st_size - num_images * INDEX_ROW if path.is_file() else -1
    if room < 0:
        return False
    start, height, width, *_ = np.fromfile(path, np.int64, offset=room).reshape(num_images, 5).T
    return bool((start >= 0).all() and (start + height * width * 3 <= room).all())


def cached_size(height: int, width: int, config: TrainConfig) -> tuple[int, int]:
    """Height and width to which an image is shrunk: a random crop of middling area is then of `input_shape`."""
    middling = (1 + config.train_crop) / 2
    factor = max(config.input_shape[0] / height, config.input_shape[1] / width) / math.sqrt(middling)
    return (height, width) if factor >= 1 else (round(height * factor), round(width * factor))


def _shrink(path: str, config: TrainConfig) -> tuple[np.ndarray, int, int] | None:
    """The shrunk image (height, width, 3), and the height and width of the original; None if it can't be read."""
    try:
        with open_to_decode(path, config.max_pixels, config.allow_truncated) as image:
            width, height = image.width, image.height
            small = cached_size(height, width, config)
            pixels = image.decode((0, 0, width, height), small).pixels
    except ImageError:
        return None
    return np.asarray(Image.fromarray(pixels).resize(small[::-1], Image.Resampling.BILINEAR)), height, width


def _write(images: ImageList, config: TrainConfig, file: BinaryIO) -> None:
    """Write the images, then the index."""
    index = np.zeros((len(images), 5), np.int64)

    def shrink(i: int) -> tuple[np.ndarray, int, int] | None:
        return _shrink(images.path(i), config)

    for i, shrunk in enumerate(map_parallel(shrink, range(len(images)), "shrinking images")):
        index[i, 0] = file.tell()
        if shrunk is not None:
            pixels, *full = shrunk
            index[i, 1:] = *pixels.shape[:2], *full
            file.write(pixels.tobytes())
    file.write(bytes(-file.tell() % index.itemsize))
    file.write(index.tobytes())


def _expected_size(images: ImageList, config: TrainConfig) -> int:
    """About how many bytes the file will have, by the headers of some images."""
    pixels = []
    for i in range(0, len(images), max(1, len(images) // SAMPLE)):
        with suppress(ImageError):
            width, height = read_size(images.path(i), config.max_pixels)
            pixels.append(math.prod(cached_size(height, width, config)))
    return int(3 * len(images) * sum(pixels) / max(len(pixels), 1))
