"""Random crops and augmentations for training images."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import ModuleType

import cv2
import numpy as np
import torch
from torch import Tensor, nn

from utils.config.train_config import Augmentation
from utils.data.image_io import Box

cv2.setNumThreads(1)  # parallelism comes from the loader's workers

ASPECT_RATIOS = (3 / 4, 4 / 3)
"""Range of the aspect ratio (width / height) of a random crop."""
GRAY = (128, 128, 128)
"""Fill color for the corners of rotated images and for letterbox bars."""

LEVELS = np.arange(256)
SMOOTHING_KERNEL = np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]]) / 13  # Pillow's ImageFilter.SMOOTH


def random_box(width: int, height: int, min_area: float) -> Box:
    """Return a random crop box covering a fraction `min_area` to 1 of the image, like torchvision's RandomResizedCrop.

    Szegedy et al., "Going Deeper with Convolutions", 2015. Area and log aspect ratio are uniform. If ten samples don't
    fit into the image, the largest centered box with an allowed aspect ratio is returned. Uses torch's global
    generator.
    """
    min_ratio, max_ratio = ASPECT_RATIOS
    for _ in range(10):
        area, ratio, x, y = torch.rand(4, dtype=torch.float64).tolist()
        pixels = width * height * (min_area + area * (1 - min_area))
        aspect = math.exp(math.log(min_ratio) + ratio * math.log(max_ratio / min_ratio))
        w, h = round(math.sqrt(pixels * aspect)), round(math.sqrt(pixels / aspect))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(x * (width - w + 1)), int(y * (height - h + 1))
            return left, top, left + w, top + h
    w, h = min(width, round(height * max_ratio)), min(height, round(width / min_ratio))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def build_augmentation(
    *, augmentation: Augmentation = "none", color_jitter: float = 0.0, random_erasing: float = 0.0
) -> nn.Sequential:
    """Return the augmentations of uint8 pixels (3, height, width) selected by these `TrainConfig` fields.

    They draw from torch's global generator.
    """
    steps: list[nn.Module] = []
    if color_jitter:
        steps.append(_v2().ColorJitter(color_jitter, color_jitter, color_jitter))
    if augmentation != "none":
        steps.append(AUGMENTATIONS[augmentation]())
    if random_erasing:
        steps.append(_v2().RandomErasing(random_erasing, value=list(GRAY)))
    return nn.Sequential(*steps)


def _v2() -> ModuleType:
    """torchvision's transforms, which are slow to import and not needed by the defaults."""
    from torchvision.transforms import v2

    return v2


class AutoAugment(nn.Module):
    """AutoAugment with the policy found on ImageNet, on uint8 pixels (3, height, width).

    Cubuk et al., "AutoAugment: Learning Augmentation Policies from Data", 2019. Matches torchvision's on Pillow images
    (see `tests/data/test_augment.py`), except that corners are gray, not black; with OpenCV it takes a quarter of the
    time. Uses torch's global generator.
    """

    def forward(self, pixels: Tensor) -> Tensor:
        choice, *draws = torch.rand(5).tolist()
        image = np.ascontiguousarray(pixels.permute(1, 2, 0).numpy())  # (height, width, 3)
        steps = POLICY[int(choice * len(POLICY))]
        for (name, probability, level), draw, sign in zip(steps, draws[:2], draws[2:], strict=True):
            if draw < probability:
                image = OPERATIONS[name](image, magnitude(name, level, negative=sign < 0.5))
        return torch.from_numpy(image).permute(2, 0, 1)


def magnitude(name: str, level: int, negative: bool) -> float:
    """Return an operation's magnitude at `level` 0 to 9; `negative` flips the sign where both signs are defined.

    ShearX: slope. Rotate: degrees. Posterize: bits kept. Solarize: threshold as a fraction of white. Color, Contrast,
    Sharpness and Brightness: the enhancement factor minus 1.
    """
    if name == "Posterize":
        return 8 - round(level * 4 / 9)
    if name == "Solarize":
        return 1 - level / 9
    value = {"ShearX": 0.3, "Rotate": 30.0}.get(name, 0.9) * level / 9
    return -value if negative else value


# Operations: uint8 (height, width, 3) and a magnitude -> a new array.


def _rotate(pixels: np.ndarray, degrees: float) -> np.ndarray:
    height, width = pixels.shape[:2]
    return _warp(pixels, cv2.getRotationMatrix2D(((width - 1) / 2, (height - 1) / 2), degrees, 1.0))


def _shear_x(pixels: np.ndarray, slope: float) -> np.ndarray:
    # -slope / 2: the axis is the upper edge of the image, not the center of its first row.
    return _warp(pixels, np.array([[1, -slope, -slope / 2], [0, 1, 0]]))


def _warp(pixels: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    size = pixels.shape[1::-1]
    return cv2.warpAffine(pixels, matrix, size, flags=cv2.INTER_NEAREST, borderValue=GRAY)


def _color(pixels: np.ndarray, strength: float) -> np.ndarray:
    gray = cv2.cvtColor(cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)
    return cv2.addWeighted(pixels, 1 + strength, gray, -strength, 0)


def _sharpness(pixels: np.ndarray, strength: float) -> np.ndarray:
    smooth = cv2.filter2D(pixels, -1, SMOOTHING_KERNEL)
    result = pixels.copy()  # border pixels stay unchanged
    result[1:-1, 1:-1] = cv2.addWeighted(pixels, 1 + strength, smooth, -strength, 0)[1:-1, 1:-1]
    return result


def _lookup(make_table: Callable[[np.ndarray, float], np.ndarray]) -> Callable[[np.ndarray, float], np.ndarray]:
    """Return an operation that maps levels by a table (256,), or (256, 3) with one table per channel."""

    def operation(pixels: np.ndarray, magnitude: float) -> np.ndarray:
        table = make_table(pixels, magnitude).clip(0, 255).astype(np.uint8)
        return cv2.LUT(pixels, table if table.ndim == 1 else table[:, None])

    return operation


def _contrast(pixels: np.ndarray, strength: float) -> np.ndarray:
    mean = round(cv2.mean(cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY))[0])
    return mean + (LEVELS - mean) * (1 + strength)


def _auto_contrast(pixels: np.ndarray, _: float) -> np.ndarray:
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
    "Color": _color,
    "Sharpness": _sharpness,
    "Brightness": _lookup(lambda _, strength: LEVELS * (1 + strength)),
    "Contrast": _lookup(_contrast),
    "Posterize": _lookup(lambda _, bits: LEVELS & ~((1 << (8 - int(bits))) - 1)),
    "Solarize": _lookup(lambda _, threshold: np.where(255 * threshold > LEVELS, LEVELS, 255 - LEVELS)),
    "AutoContrast": _lookup(_auto_contrast),
    "Equalize": _lookup(_equalize),
    "Invert": _lookup(lambda *_: 255 - LEVELS),
}

# Each image gets one of the 25 sub-policies: two operations, each with its probability and level (unused by
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


AUGMENTATIONS: dict[str, Callable[[], nn.Module]] = {
    "autoaugment": AutoAugment,
    "randaugment": lambda: _v2().RandAugment(fill=list(GRAY)),
    "trivialaugment": lambda: _v2().TrivialAugmentWide(fill=list(GRAY)),
    "augmix": lambda: _v2().AugMix(fill=list(GRAY)),
}
"""The values of the field `augmentation` other than "none"."""
