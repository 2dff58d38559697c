"""Test-time augmentation (TTA): views of an image whose logits are averaged."""

from __future__ import annotations

import torch
from torch import Tensor

from utils.data.image_io import Box, Region
from utils.data.preprocessing import Preprocessing
from utils.data.transforms import EvalTransform, Transform

CORNERS = 4
UNCROPPED_SCALE = 0.875
"""With `eval_crop` = 1, the side of a corner view as a fraction of the center view's, so that views differ."""


class TTAViews(Transform):
    """Map an image to uint8 (views, 3, height, width): the evaluation crop, then crops of the same size at the corners.

    As in Krizhevsky et al., 2012. With `mirror`, each view is also flipped. With `letterbox_image`, there is one crop:
    the whole image.
    """

    def __init__(self, preprocessing: Preprocessing, mirror: bool) -> None:
        self.center = EvalTransform(preprocessing)
        self.size = preprocessing.input_shape
        self.mirror = mirror

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the result, (views, 3, height, width)."""
        return (1 if self.center.letterbox else 1 + CORNERS) * (1 + self.mirror), *self.center.shape

    def choose_box(self, width: int, height: int) -> Box:
        """The whole image."""
        return 0, 0, width, height

    def resize(self, region: Region) -> Tensor:
        """All views, resized."""
        views = torch.stack([self.center.resize(Region(region.pixels, box)) for box in self.boxes(region)])
        return torch.cat([views, views.flip(-1)]) if self.mirror else views

    def boxes(self, region: Region) -> list[Box]:
        """The crop of each view, without flips."""
        height, width = region.pixels.shape[:2]
        left, top, right, bottom = self.center.choose_box(width, height)
        if self.center.letterbox:
            return [(left, top, right, bottom)]
        crop_width, crop_height = right - left, bottom - top
        if self.center.crop == 1:
            crop_width, crop_height = UNCROPPED_SCALE * crop_width, UNCROPPED_SCALE * crop_height
        corners = [(x, y) for y in (0, height - crop_height) for x in (0, width - crop_width)]
        return [(left, top, right, bottom), *((x, y, x + crop_width, y + crop_height) for x, y in corners)]
