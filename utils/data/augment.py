"""What is drawn for a training image: its crop, and how it is changed."""

from __future__ import annotations

import math
from collections.abc import Callable

import cv2
import numpy as np
import torch
from torch import Tensor, nn

from utils.data.image_io import Box

cv2.setNumThreads(1)  # the images are small, and the workers are the threads

ASPECT_RATIOS = (3 / 4, 4 / 3)
"""Least and greatest width to height of a random crop."""
GREY = (128, 128, 128)
"""What fills the corners of a turned image, and the bars of a letterbox."""

LEVELS = np.arange(256)
SMOOTH = np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]]) / 13


def random_box(width: int, height: int, least_area: float) -> Box:
    """A part of an image, of `least_area` (0 to 1) of its area or more, as torchvision's RandomResizedCrop draws it.

    Szegedy et al., "Going Deeper with Convolutions", 2015. The area is uniform, the logarithm of the aspect ratio too;
    if ten draws don't fit into the image, it is the largest centred part with an aspect ratio that is allowed.
    Drawn from torch's global generator.
    """
    narrow, wide = ASPECT_RATIOS
    for _ in range(10):
        area, ratio, across, down = torch.rand(4, dtype=torch.float64).tolist()
        pixels = width * height * (least_area + area * (1 - least_area))
        aspect = math.exp(math.log(narrow) + ratio * math.log(wide / narrow))
        w, h = round(math.sqrt(pixels * aspect)), round(math.sqrt(pixels / aspect))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(across * (width - w + 1)), int(down * (height - h + 1))
            return left, top, left + w, top + h
    w, h = min(width, round(height * wide)), min(height, round(width / narrow))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def make_changes(color_jitter: float, augmentation: str, random_erasing: float) -> nn.Sequential:
    """What happens to the uint8 pixels (3, height, width) of a training image, see `TrainConfig`; all of it draws
    from torch's global generator."""
    changes: list[nn.Module] = [AutoAugment()] if augmentation == "autoaugment" else []
    if augmentation not in ("autoaugment", "none") or color_jitter or random_erasing:
        from torchvision.transforms import v2  # takes a second, and the defaults don't need it

        others = {"randaugment": v2.RandAugment, "trivialaugment": v2.TrivialAugmentWide, "augmix": v2.AugMix}
        if augmentation in others:
            changes.append(others[augmentation](fill=list(GREY)))
        if color_jitter:
            changes.insert(0, v2.ColorJitter(color_jitter, color_jitter, color_jitter))
        if random_erasing:
            changes.append(v2.RandomErasing(random_erasing, value=list(GREY)))
    return nn.Sequential(*changes)


class AutoAugment(nn.Module):
    """AutoAugment with the policy found on ImageNet, on uint8 pixels (3, height, width).

    Cubuk et al., "AutoAugment: Learning Augmentation Policies from Data", 2019. What it gives is what torchvision's
    gives on Pillow's images (held by `tests/data/test_augment.py`), but for corners in grey instead of black, in a
    quarter of the time: OpenCV does the work. Drawn from torch's global generator.
    """

    def forward(self, pixels: Tensor) -> Tensor:
        which, *draws = torch.rand(5).tolist()
        image = np.ascontiguousarray(pixels.permute(1, 2, 0).numpy())  # (height, width, 3)
        steps = POLICY[int(which * len(POLICY))]
        for (name, probability, level), draw, sign in zip(steps, draws[:2], draws[2:], strict=True):
            if draw < probability:
                image = OPERATIONS[name](image, magnitude(name, level, negative=sign < 0.5))
        return torch.from_numpy(image).permute(2, 0, 1)


def magnitude(name: str, level: int, negative: bool) -> float:
    """What a level of 0 to 9 means for an operation; `negative` counts for those that go both ways.

    Shear is a slope, Rotate is in degrees, Posterize in bits, Solarize the part of white from which levels are turned;
    of Color, Contrast, Sharpness and Brightness it is what is added to 1, which changes nothing.
    """
    if name == "Posterize":
        return 8 - round(level * 4 / 9)
    if name == "Solarize":
        return 1 - level / 9
    value = {"ShearX": 0.3, "Rotate": 30.0}.get(name, 0.9) * level / 9
    return -value if negative else value


# The operations below take uint8 (height, width, 3) and a magnitude, and give a new array.


def _rotate(pixels: np.ndarray, degrees: float) -> np.ndarray:
    height, width = pixels.shape[:2]
    return _warp(pixels, cv2.getRotationMatrix2D(((width - 1) / 2, (height - 1) / 2), degrees, 1.0))


def _shear_x(pixels: np.ndarray, slope: float) -> np.ndarray:
    # Half a row more: the axis is the upper edge of the image, not the middle of its first row.
    return _warp(pixels, np.array([[1, -slope, -slope / 2], [0, 1, 0]]))


def _warp(pixels: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    size = pixels.shape[1::-1]
    return cv2.warpAffine(pixels, matrix, size, flags=cv2.INTER_NEAREST, borderValue=GREY)


def _saturate(pixels: np.ndarray, more: float) -> np.ndarray:
    grey = cv2.cvtColor(cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)
    return cv2.addWeighted(pixels, 1 + more, grey, -more, 0)


def _sharpen(pixels: np.ndarray, more: float) -> np.ndarray:
    smooth = cv2.filter2D(pixels, -1, SMOOTH)
    changed = pixels.copy()  # the outermost pixels stay
    changed[1:-1, 1:-1] = cv2.addWeighted(pixels, 1 + more, smooth, -more, 0)[1:-1, 1:-1]
    return changed


def _by_table(make: Callable[[np.ndarray, float], np.ndarray]) -> Callable[[np.ndarray, float], np.ndarray]:
    """An operation that replaces each level by another: `make` gives the table (256,), or (256, 3) for each channel."""

    def operation(pixels: np.ndarray, magnitude: float) -> np.ndarray:
        table = make(pixels, magnitude).clip(0, 255).astype(np.uint8)
        return cv2.LUT(pixels, table if table.ndim == 1 else table[:, None])

    return operation


def _contrast(pixels: np.ndarray, more: float) -> np.ndarray:
    mean = round(cv2.mean(cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY))[0])
    return mean + (LEVELS - mean) * (1 + more)


def _stretch(pixels: np.ndarray, _: float) -> np.ndarray:
    low, high = np.array([cv2.minMaxLoc(plane)[:2] for plane in cv2.split(pixels)]).T
    return np.where(high > low, (LEVELS[:, None] - low) * 255 / np.maximum(high - low, 1), LEVELS[:, None])


def _equalize(pixels: np.ndarray, _: float) -> np.ndarray:
    counts = np.stack([cv2.calcHist([pixels], [i], None, [256], [0, 256]).ravel() for i in range(3)], axis=1)
    counts = counts.astype(np.int64)  # (256, 3)
    highest = 255 - (counts[::-1] > 0).argmax(axis=0, keepdims=True)
    step = (counts.sum(axis=0) - np.take_along_axis(counts, highest, axis=0)) // 255
    below = counts.cumsum(axis=0) - counts
    return np.where(step, (below + step // 2) // np.maximum(step, 1), LEVELS[:, None])


OPERATIONS = {
    "ShearX": _shear_x,
    "Rotate": _rotate,
    "Color": _saturate,
    "Sharpness": _sharpen,
    "Brightness": _by_table(lambda _, more: LEVELS * (1 + more)),
    "Contrast": _by_table(_contrast),
    "Posterize": _by_table(lambda _, bits: LEVELS & ~((1 << (8 - int(bits))) - 1)),
    "Solarize": _by_table(lambda _, part: np.where(255 * part > LEVELS, LEVELS, 255 - LEVELS)),
    "AutoContrast": _by_table(_stretch),
    "Equalize": _by_table(_equalize),
    "Invert": _by_table(lambda *_: 255 - LEVELS),
}

# Of the 25 one is drawn for each image: two operations, each with its probability and its level (without meaning for
# AutoContrast, Equalize and Invert).
POLICY = (
    (("Posterize", 0.4, 8), ("Rotate", 0.6, 9)),
    (("Solarize", 0.6, 5), ("AutoContrast", 0.6, 0)),
    (("Equalize", 0.8, 0), ("Equalize", 0.6, 0)),
    (("Posterize", 0.6, 7), ("Posterize", 0.6, 6)),
    (("Equalize", 0.4, 0), ("Solarize", 0.2, 4)),
    (("Equalize", 0.4, 0), ("Rotate", 0.8, 8)),
    (("Solarize", 0.6, 3), ("Equalize", 0.6, 0)),
    (("Posterize", 0.8, 5), ("Equalize", 1.0, 0)),
    (("Rotate", 0.2, 3), ("Solarize", 0.6, 8)),
    (("Equalize", 0.6, 0), ("Posterize", 0.4, 6)),
    (("Rotate", 0.8, 8), ("Color", 0.4, 0)),
    (("Rotate", 0.4, 9), ("Equalize", 0.6, 0)),
    (("Equalize", 0.0, 0), ("Equalize", 0.8, 0)),
    (("Invert", 0.6, 0), ("Equalize", 1.0, 0)),
    (("Color", 0.6, 4), ("Contrast", 1.0, 8)),
    (("Rotate", 0.8, 8), ("Color", 1.0, 2)),
    (("Color", 0.8, 8), ("Solarize", 0.8, 7)),
    (("Sharpness", 0.4, 7), ("Invert", 0.6, 0)),
    (("ShearX", 0.6, 5), ("Equalize", 1.0, 0)),
    (("Color", 0.4, 0), ("Equalize", 0.6, 0)),
    (("Equalize", 0.4, 0), ("Solarize", 0.2, 4)),
    (("Solarize", 0.6, 5), ("AutoContrast", 0.6, 0)),
    (("Invert", 0.6, 0), ("Equalize", 1.0, 0)),
    (("Color", 0.6, 4), ("Contrast", 1.0, 8)),
    (("Equalize", 0.8, 0), ("Equalize", 0.6, 0)),
)
