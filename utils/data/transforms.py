"""Transforms of images to network inputs, for training and for evaluation."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor

from utils.config.train_config import TrainConfig
from utils.data.augment import GRAY, build_augmentation, random_box
from utils.data.image_io import Box, Region
from utils.data.preprocessing import Preprocessing

SUPPORT = {"bilinear": 1.0, "bicubic": 2.0}
"""Support (radius) of the resampling filters, in output pixels."""


class Decodable(Protocol):
    """An opened image: `utils.data.image_io.OpenImage` or `utils.data.image_cache.CachedImage`."""

    width: int
    height: int

    def decode(self, box: Box, size: tuple[int, int]) -> Region:
        """See `utils.data.image_io.OpenImage.decode`."""


class Transform(ABC):
    """Maps an image to uint8 pixels (3, height, width) in three steps: crop, resize, augment.

    The crop box is chosen before decoding, so a JPEG can be decoded at a lower resolution.

    Attributes:
        size: height and width of the result.
    """

    size: tuple[int, int]

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the result."""
        return 3, *self.size

    @abstractmethod
    def choose_box(self, width: int, height: int) -> Box:
        """Return the crop box for an upright image of this size."""

    def region(self, image: Decodable) -> Region:
        """Decode the crop."""
        return image.decode(self.choose_box(image.width, image.height), self.size)

    @abstractmethod
    def resize(self, region: Region) -> Tensor:
        """Resize the crop to pixels (3, height, width)."""

    def augment(self, pixels: Tensor) -> Tensor:
        """Augment pixels (3, height, width); the identity except in training."""
        return pixels

    def __call__(self, image: Image.Image) -> Tensor:
        """Apply all steps to an upright RGB image in memory."""
        return self.augment(self.resize(Region(np.array(image), self.choose_box(*image.size))))


class TrainTransform(Transform):
    """Random resized crop, horizontal flip and augmentation. Uses torch's global generator."""

    def __init__(self, config: TrainConfig) -> None:
        self.size = config.input_shape
        self.interpolation = Preprocessing.from_config(config).interpolation
        self.min_area = config.train_crop
        self.horizontal_flip = config.horizontal_flip
        self.augmentation = build_augmentation(
            augmentation=config.augmentation, color_jitter=config.color_jitter, random_erasing=config.random_erasing
        )

    def choose_box(self, width: int, height: int) -> Box:
        """Return a box of random position, area and aspect ratio."""
        return random_box(width, height, self.min_area)

    def resize(self, region: Region) -> Tensor:
        """Resize the crop, its box rounded to whole pixels."""
        left, top, right, bottom = map(round, region.box)
        crop = torch.from_numpy(region.pixels)[None, top : max(bottom, top + 1), left : max(right, left + 1)]
        # In channels-last format torch resizes uint8 natively, several times faster than Pillow.
        return F.interpolate(crop.permute(0, 3, 1, 2), self.size, mode=self.interpolation, antialias=True)[0]

    def augment(self, pixels: Tensor) -> Tensor:
        """Flip at random, then apply the configured augmentations."""
        if torch.rand(()) < self.horizontal_flip:
            pixels = pixels.flip(-1)
        return self.augmentation(pixels)


class EvalTransform(Transform):
    """Center crop, or with `letterbox_image` the whole image padded with gray; used for validation and prediction.

    The crop is the largest centered box with the aspect ratio of `input_shape`, scaled by `eval_crop`. For square
    shapes this equals the usual "resize the short side to size / crop, then center crop", in one step.
    """

    def __init__(self, preprocessing: Preprocessing) -> None:
        self.size = preprocessing.input_shape
        self.crop = preprocessing.eval_crop
        self.filter = Image.Resampling[preprocessing.interpolation.upper()]
        self.letterbox = preprocessing.letterbox_image

    def choose_box(self, width: int, height: int) -> Box:
        """Return the centered box, with fractional edges, or the whole image."""
        if self.letterbox:
            return 0, 0, width, height
        # input pixels per output pixel
        scale = self.crop * min(height / self.size[0], width / self.size[1])
        left, top = (width - self.size[1] * scale) / 2, (height - self.size[0] * scale) / 2
        return max(0, left), max(0, top), min(width, width - left), min(height, height - top)

    def resize(self, region: Region) -> Tensor:
        """Resize the crop, or resize and pad the whole image."""
        size = self.size[::-1]
        if self.letterbox:
            height, width = region.pixels.shape[:2]
            fitted = self._resize(Region(region.pixels, (0, 0, width, height)), self._fitted(width, height))
            image = ImageOps.pad(fitted, size, color=GRAY)
        else:
            image = self._resize(region, size)
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)

    def _resize(self, region: Region, size: tuple[int, int]) -> Image.Image:
        """Resize to (width, height), horizontally first.

        Pillow 13 chooses the order of the two passes by their cost. Levels are rounded in between, so with a free
        choice exported networks and other versions of Pillow would get other pixels.
        """
        left, top, right, bottom = (float(np.float32(edge)) for edge in region.box)  # Pillow's precision for boxes
        reach = math.ceil(max(SUPPORT.values()) * max(1, (bottom - top) / size[1])) + 1
        first = max(0, math.floor(top) - reach)
        rows = Image.fromarray(region.pixels[first : math.ceil(bottom) + reach])
        narrow = rows.resize((size[0], rows.height), self.filter, box=(left, 0, right, rows.height))
        return narrow.resize(size, self.filter, box=(0, top - first, size[0], bottom - first))

    def _fitted(self, width: int, height: int) -> tuple[int, int]:
        """Return the largest width and height, 1 or more, that fit into `size` at the image's aspect ratio."""
        max_height, max_width = self.size
        if width / height > max_width / max_height:
            return max_width, max(1, round(height / width * max_width))
        return max(1, round(width / height * max_height)), max_height
