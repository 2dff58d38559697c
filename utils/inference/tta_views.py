"""Several views of an image, whose answers are averaged: test-time augmentation."""

from __future__ import annotations

import torch
from torch import Tensor

from utils.data.image_io import Box, Region
from utils.data.preprocessing import Preprocessing
from utils.data.transforms import EvalTransform, Transform

PART = 0.875
"""The part of each side of what evaluation shows that the views at its corners show, where it shows all there is."""


class TTAViews(Transform):
    """An image to uint8 (views, 3, height, width): the part that evaluation shows, then parts of its size at the
    corners of the image, after Krizhevsky et al., 2012; each also mirrored if training mirrored.

    With `letterbox_image` there is one part, all of it.
    """

    def __init__(self, preprocessing: Preprocessing, mirror: bool) -> None:
        self.centre = EvalTransform(preprocessing)
        self.size = preprocessing.input_shape
        self.mirror = mirror

    def choose_box(self, width: int, height: int) -> Box:
        """All of it."""
        return 0, 0, width, height

    def resize(self, region: Region) -> Tensor:
        """All views."""
        views = torch.stack([self.centre.resize(Region(region.pixels, box)) for box in self.boxes(region)])
        return torch.cat([views, views.flip(-1)]) if self.mirror else views

    def boxes(self, region: Region) -> list[Box]:
        """The parts."""
        height, width = region.pixels.shape[:2]
        left, top, right, bottom = self.centre.choose_box(width, height)
        if self.centre.letterbox:
            return [(left, top, right, bottom)]
        across, down = right - left, bottom - top
        if self.centre.crop == 1:
            across, down = PART * across, PART * down
        corners = [(x, y) for y in (0, height - down) for x in (0, width - across)]
        return [(left, top, right, bottom), *((x, y, x + across, y + down) for x, y in corners)]
