"""What happens to an image between the file and the network, for training and for evaluation side by side."""

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
from utils.data.augment import GREY, make_changes, random_box
from utils.data.image_io import Box, Region
from utils.data.preprocessing import Preprocessing

SUPPORT = {"bilinear": 1.0, "bicubic": 2.0}
"""How far a filter reaches, in pixels of the result."""


class Decodable(Protocol):
    """What a transform takes a part of: `utils.data.image_io.OpenImage`, or an image of a cache."""

    width: int
    height: int

    def decode(self, box: Box, size: tuple[int, int]) -> Region:
        """See `utils.data.image_io.OpenImage.decode`."""


class Transform(ABC):
    """An image to uint8 pixels (3, height, width), in three steps: choose a part, which is known before the file is
    decoded and so decides how finely that is done; resize it; augment it.

    Attributes:
        size: height and width of the result.
    """

    size: tuple[int, int]

    @abstractmethod
    def choose_box(self, width: int, height: int) -> Box:
        """The part that is wanted of an upright image of this size."""

    def region(self, image: Decodable) -> Region:
        """That part of an image, decoded."""
        return image.decode(self.choose_box(image.width, image.height), self.size)

    @abstractmethod
    def resize(self, region: Region) -> Tensor:
        """That part as pixels (3, height, width)."""

    def augment(self, pixels: Tensor) -> Tensor:
        """The same pixels (3, height, width) changed, for training."""
        return pixels

    def __call__(self, image: Image.Image) -> Tensor:
        """All steps, for an upright RGB image that is in memory."""
        return self.augment(self.resize(Region(np.array(image), self.choose_box(*image.size))))


class TrainTransform(Transform):
    """A random part of an image to uint8 (3, height, width), with augmentation.

    All is drawn from torch's global generator.
    """

    def __init__(self, config: TrainConfig) -> None:
        self.size = config.input_shape
        self.interpolation = Preprocessing.of(config).interpolation
        self.least_area = config.train_crop
        self.horizontal_flip = config.horizontal_flip
        self.changes = make_changes(config.color_jitter, config.augmentation, config.random_erasing)

    def choose_box(self, width: int, height: int) -> Box:
        """A part of random place, area and aspect ratio."""
        return random_box(width, height, self.least_area)

    def resize(self, region: Region) -> Tensor:
        """The part resized. Its box is taken to whole pixels."""
        left, top, right, bottom = map(round, region.box)
        part = torch.from_numpy(region.pixels)[None, top : max(bottom, top + 1), left : max(right, left + 1)]
        # In this order of memory torch resizes uint8 as it is, several times as fast as Pillow.
        return F.interpolate(part.permute(0, 3, 1, 2), self.size, mode=self.interpolation, antialias=True)[0]

    def augment(self, pixels: Tensor) -> Tensor:
        """Mirrored or not, then changed as the settings say."""
        if torch.rand(()) < self.horizontal_flip:
            pixels = pixels.flip(-1)
        return self.changes(pixels)


class EvalTransform(Transform):
    """An image to uint8 (3, height, width): the same for validation, evaluation and prediction.

    Either the centre: the largest part with the aspect ratio of `input_shape`, times `eval_crop`. With a square shape
    this is the usual "resize the short side to size / crop, then crop the centre", in one step and without the pixels
    that are cut off. Or, with `letterbox_image`, all of it, with grey around.
    """

    def __init__(self, preprocessing: Preprocessing) -> None:
        self.size = preprocessing.input_shape
        self.crop = preprocessing.eval_crop
        self.filter = Image.Resampling[preprocessing.interpolation.upper()]
        self.letterbox = preprocessing.letterbox_image

    def choose_box(self, width: int, height: int) -> Box:
        """The centre, in fractions of pixels, or all of it."""
        if self.letterbox:
            return 0, 0, width, height
        # pixels of the image to one of the result
        scale = self.crop * min(height / self.size[0], width / self.size[1])
        left, top = (width - self.size[1] * scale) / 2, (height - self.size[0] * scale) / 2
        return max(0, left), max(0, top), min(width, width - left), min(height, height - top)

    def resize(self, region: Region) -> Tensor:
        """The part, or all of it and grey, resized."""
        size = self.size[::-1]
        if self.letterbox:
            height, width = region.pixels.shape[:2]
            fitted = self._resize(Region(region.pixels, (0, 0, width, height)), self._fitted(width, height))
            image = ImageOps.pad(fitted, size, color=GREY)
        else:
            image = self._resize(region, size)
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)

    def _resize(self, region: Region, size: tuple[int, int]) -> Image.Image:
        """The part at this width and height, across first and then down. Left to itself Pillow 13 begins with what
        saves it work, and as levels are rounded in between, an export or another Pillow would have other pixels."""
        left, top, right, bottom = (float(np.float32(edge)) for edge in region.box)  # as Pillow takes a box
        reach = math.ceil(max(SUPPORT.values()) * max(1, (bottom - top) / size[1])) + 1
        first = max(0, math.floor(top) - reach)
        rows = Image.fromarray(region.pixels[first : math.ceil(bottom) + reach])
        across = rows.resize((size[0], rows.height), self.filter, box=(left, 0, right, rows.height))
        return across.resize(size, self.filter, box=(0, top - first, size[0], bottom - first))

    def _fitted(self, width: int, height: int) -> tuple[int, int]:
        """The largest width and height with the aspect ratio of an image that fit; of a strip a pixel is left."""
        most_rows, most_columns = self.size
        if width / height > most_columns / most_rows:
            return most_columns, max(1, round(height / width * most_columns))
        return max(1, round(width / height * most_rows)), most_rows
