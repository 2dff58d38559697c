"""Pillow's resize as a module of plain tensor operations, so that an exported file prepares its images by itself.

What `EvalTransform` does to an image in memory is two matrix products here, one across and one down, whose weights are
computed from the image's size. Pillow's arithmetic (its `Resample.c`) is followed to the bit: weights are whole
numbers of 22 bits, and levels are rounded to whole numbers after each product. So that fp32 adds up without rounding, a
weight is split into two of 11 bits; then neither the order of the sums nor TF32 changes a pixel.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from utils.data.augment import GREY
from utils.data.preprocessing import Preprocessing
from utils.data.transforms import SUPPORT

FIXED_POINT = float(1 << 22)
"""Pillow's weights are whole numbers, of which these are 1."""
HALF_OF_THE_BITS = float(1 << 11)


class Span(NamedTuple):
    """What becomes of one axis: of the pixels of the image, `extent` from `start` on become `count` pixels of the
    result, from `first` on. All are scalars of float64, the first two fractions of pixels."""

    start: Tensor
    extent: Tensor
    first: Tensor
    count: Tensor


class PixelResize(nn.Module):
    """Images uint8 (B, height, width, 3) of any size to what `EvalTransform` makes of them: levels (B, 3,
    *input_shape), whole numbers from 0 to 255 in fp32."""

    def __init__(self, preprocessing: Preprocessing) -> None:
        super().__init__()
        self.size = preprocessing.input_shape
        self.crop = preprocessing.eval_crop
        self.letterbox = preprocessing.letterbox_image
        self.interpolation = preprocessing.interpolation

    def forward(self, images: Tensor) -> Tensor:
        # Both products are dense though most weights are zero: 12 megapixels still take but 0.2 s on two cores.
        height, width = images.shape[1], images.shape[2]
        down, across = self._spans(_scalar(height), _scalar(width))
        to_width = filter_weights(across, width, self.size[1], self.interpolation)  # (2 w, width)
        to_height = filter_weights(down, height, self.size[0], self.interpolation)  # (2 h, height)
        levels = images.permute(0, 3, 1, 2).float()  # (B, 3, height, width)
        levels = _add_up(levels @ to_width.T, dim=3)  # (B, 3, height, w)
        levels = _add_up(to_height @ levels, dim=2)  # (B, 3, h, w)
        if not self.letterbox:
            return levels
        filled = _inside(down, self.size[0])[:, None] & _inside(across, self.size[1])  # (h, w)
        return torch.where(filled, levels, torch.tensor(GREY, dtype=torch.float32).view(3, 1, 1))

    def _spans(self, height: Tensor, width: Tensor) -> tuple[Span, Span]:
        """What becomes of the height and of the width, scalars of float64."""
        if self.letterbox:
            return self._letterbox_spans(height, width)
        # As EvalTransform.choose_box; Pillow takes the box in single precision.
        scale = self.crop * torch.minimum(height / self.size[0], width / self.size[1])
        spans = []
        for length, size in ((height, self.size[0]), (width, self.size[1])):
            rest = (length - size * scale) / 2
            start, end = rest.clamp_min(0).float(), torch.minimum(length, length - rest).float()
            spans.append(
                Span(start.double(), (end - start).double(), torch.zeros_like(length), torch.full_like(length, size))
            )
        return spans[0], spans[1]

    def _letterbox_spans(self, height: Tensor, width: Tensor) -> tuple[Span, Span]:
        """As EvalTransform and ImageOps.pad: all of it, as large as fits, in the middle."""
        ratio, wanted = width / height, self.size[1] / self.size[0]
        rows = torch.where(ratio > wanted, (height / width * self.size[1]).round().clamp_min(1), float(self.size[0]))
        columns = torch.where(ratio < wanted, (width / height * self.size[0]).round().clamp_min(1), float(self.size[1]))
        zero = torch.zeros_like(height)
        return (
            Span(zero, height, ((self.size[0] - rows) * 0.5).round(), rows),
            Span(zero, width, ((self.size[1] - columns) * 0.5).round(), columns),
        )


def filter_weights(span: Span, length: int, size: int, interpolation: str) -> Tensor:
    """What each of the `length` pixels on an axis of an image weighs in each of the `size` pixels of the result.

    Returns:
        fp32 (2 * size, length): the upper half of the bits of all weights, then the lower one. Rows of pixels outside
        the span mean nothing.
    """
    scale = span.extent / span.count  # pixels of the image to one of the result
    stretch = scale.clamp_min(1)  # an enlarged image is interpolated, a reduced one averaged
    reach = SUPPORT[interpolation] * stretch
    index = torch.arange(size, dtype=torch.float64) - span.first
    centre = (span.start + (index + 0.5) * scale)[:, None]  # (size, 1)
    pixel = torch.arange(length, dtype=torch.float64)  # (length,)
    within = (pixel >= (centre - reach + 0.5).floor()) & (pixel < (centre + reach + 0.5).floor())
    weights = torch.where(within, _filter((pixel - centre + 0.5) / stretch, interpolation), 0.0)
    total = weights.sum(dim=1, keepdim=True)
    weights = weights / torch.where(total == 0, 1.0, total) * FIXED_POINT
    fixed = weights.sign() * (weights.abs() + 0.5).floor()
    upper = (fixed / HALF_OF_THE_BITS).floor()
    return torch.cat([upper, fixed - upper * HALF_OF_THE_BITS]).float()


def _filter(x: Tensor, interpolation: str) -> Tensor:
    """The filter's value at a distance of `x` pixels."""
    x = x.abs()
    if interpolation == "bilinear":
        return (1 - x).clamp_min(0)
    # Keys' cubic with a = -0.5
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    return torch.where(x < 1, near, torch.where(x < 2, far, 0.0))


def _add_up(sums: Tensor, dim: int) -> Tensor:
    """Levels from the sums of both halves of the bits, one after the other in `dim`; halves of a level go up."""
    upper, lower = sums.double().chunk(2, dim)
    return ((upper * HALF_OF_THE_BITS + lower) / FIXED_POINT + 0.5).floor().clamp(0, 255).float()


def _inside(span: Span, size: int) -> Tensor:
    """Bool (size,): which pixels of the result show the image."""
    index = torch.arange(size, dtype=torch.float64)
    return (index >= span.first) & (index < span.first + span.count)


def _scalar(length: int) -> Tensor:
    return torch.scalar_tensor(length, dtype=torch.float64)
