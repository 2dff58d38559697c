"""Pillow's resize as tensor operations: preprocessing becomes part of the exported graph.

`EvalTransform` on an image in memory becomes two matrix products, one per axis, whose weights are computed from the
image's size. Results are bit-identical to Pillow's `Resample.c`: weights are 22-bit fixed-point numbers, and values are
rounded to integers after each product. Each weight is split into two of 11 bits, which makes fp32 sums exact: neither
the order of summation nor TF32 changes a pixel.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from utils.data.augment import GRAY
from utils.data.preprocessing import Preprocessing
from utils.data.transforms import SUPPORT

FIXED_POINT = float(1 << 22)
"""The fixed-point representation of 1 in Pillow's weights."""
HALF_BITS = float(1 << 11)


class Span(NamedTuple):
    """The mapping along one axis: `extent` input pixels from `start` become `count` output pixels from `first`.

    All are float64 scalars; `start` and `extent` may be fractional.
    """

    start: Tensor
    extent: Tensor
    first: Tensor
    count: Tensor


class PixelResize(nn.Module):
    """Maps uint8 images (B, height, width, 3) of any size to the output of `EvalTransform`, in fp32 (B, 3, h, w)."""

    def __init__(self, preprocessing: Preprocessing) -> None:
        super().__init__()
        self.size = preprocessing.input_shape
        self.crop = preprocessing.eval_crop
        self.letterbox = preprocessing.letterbox_image
        self.interpolation = preprocessing.interpolation

    def forward(self, images: Tensor) -> Tensor:
        # Dense products, though most weights are zero: 12 megapixels take only 0.2 s on two cores.
        height, width = images.shape[1], images.shape[2]
        down, across = self._spans(_scalar(height), _scalar(width))
        to_width = filter_weights(across, width, self.size[1], self.interpolation)  # (2 w, width)
        to_height = filter_weights(down, height, self.size[0], self.interpolation)  # (2 h, height)
        values = images.permute(0, 3, 1, 2).float()  # (B, 3, height, width)
        values = _add_up(values @ to_width.T, dim=3)  # (B, 3, height, w)
        values = _add_up(to_height @ values, dim=2)  # (B, 3, h, w)
        if not self.letterbox:
            return values
        filled = _inside(down, self.size[0])[:, None] & _inside(across, self.size[1])  # (h, w)
        return torch.where(filled, values, torch.tensor(GRAY, dtype=torch.float32).view(3, 1, 1))

    def _spans(self, height: Tensor, width: Tensor) -> tuple[Span, Span]:
        """The spans of height and width, which are float64 scalars."""
        if self.letterbox:
            return self._letterbox_spans(height, width)
        # As EvalTransform.choose_box. Pillow stores the box in single precision.
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
        """The whole image, as large as fits, centered, as in EvalTransform and ImageOps.pad."""
        ratio, wanted = width / height, self.size[1] / self.size[0]
        rows = torch.where(ratio > wanted, (height / width * self.size[1]).round().clamp_min(1), float(self.size[0]))
        columns = torch.where(ratio < wanted, (width / height * self.size[0]).round().clamp_min(1), float(self.size[1]))
        zero = torch.zeros_like(height)
        return (
            Span(zero, height, ((self.size[0] - rows) * 0.5).round(), rows),
            Span(zero, width, ((self.size[1] - columns) * 0.5).round(), columns),
        )


def filter_weights(span: Span, length: int, size: int, interpolation: str) -> Tensor:
    """The weight of each of `length` input pixels for each of `size` output pixels, along one axis.

    Returns:
        fp32 (2 * size, length): the upper 11 bits of all weights, then the lower 11 bits. Rows of output pixels outside
        the span are meaningless.
    """
    scale = span.extent / span.count  # input pixels per output pixel
    stretch = scale.clamp_min(1)  # interpolation when enlarging, averaging when reducing
    reach = SUPPORT[interpolation] * stretch
    index = torch.arange(size, dtype=torch.float64) - span.first
    center = (span.start + (index + 0.5) * scale)[:, None]  # (size, 1)
    pixel = torch.arange(length, dtype=torch.float64)  # (length,)
    within = (pixel >= (center - reach + 0.5).floor()) & (pixel < (center + reach + 0.5).floor())
    weights = torch.where(within, _filter((pixel - center + 0.5) / stretch, interpolation), 0.0)
    total = weights.sum(dim=1, keepdim=True)
    weights = weights / torch.where(total == 0, 1.0, total) * FIXED_POINT
    fixed = weights.sign() * (weights.abs() + 0.5).floor()
    upper = (fixed / HALF_BITS).floor()
    return torch.cat([upper, fixed - upper * HALF_BITS]).float()


def _filter(x: Tensor, interpolation: str) -> Tensor:
    """The interpolation filter at distance `x`."""
    x = x.abs()
    if interpolation == "bilinear":
        return (1 - x).clamp_min(0)
    # Keys' cubic with a = -0.5
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    return torch.where(x < 1, near, torch.where(x < 2, far, 0.0))


def _add_up(sums: Tensor, dim: int) -> Tensor:
    """Pixel values from the sums of upper and lower bits, concatenated along `dim`; halves round up."""
    upper, lower = sums.double().chunk(2, dim)
    return ((upper * HALF_BITS + lower) / FIXED_POINT + 0.5).floor().clamp(0, 255).float()


def _inside(span: Span, size: int) -> Tensor:
    """Bool (size,): which output pixels are part of the image."""
    index = torch.arange(size, dtype=torch.float64)
    return (index >= span.first) & (index < span.first + span.count)


def _scalar(length: int) -> Tensor:
    return torch.scalar_tensor(length, dtype=torch.float64)
