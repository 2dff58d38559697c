"""Images a little worse than they were: how much a classifier minds blur, compression, noise, light and rotation.

After Hendrycks and Dietterich, 2019, https://arxiv.org/abs/1903.12261, at about their mildest strength, so that a
person would name the images as before. They are applied to what the network is shown.
"""

from __future__ import annotations

from collections.abc import Callable

import cv2
import numpy as np
import torch
from torch import Tensor

Corruption = Callable[[np.ndarray, np.random.Generator], np.ndarray]
"""From pixels (height, width, 3) uint8 to as many."""


def blur(pixels: np.ndarray, _: np.random.Generator) -> np.ndarray:
    """Gaussian, with a deviation of 1 pixel in 112."""
    return cv2.GaussianBlur(pixels, (0, 0), max(pixels.shape[:2]) / 112)


def jpeg(pixels: np.ndarray, _: np.random.Generator) -> np.ndarray:
    """Compressed at quality 25."""
    _, encoded = cv2.imencode(".jpg", cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, 25])
    return cv2.cvtColor(cv2.imdecode(encoded, cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB)


def noise(pixels: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Gaussian, with a deviation of 8 % of the range."""
    return _to_levels(pixels + generator.normal(0, 0.08 * 255, pixels.shape))


def darker(pixels: np.ndarray, _: np.random.Generator) -> np.ndarray:
    """Three quarters of the light."""
    return _to_levels(pixels * 0.75)


def brighter(pixels: np.ndarray, _: np.random.Generator) -> np.ndarray:
    """Up by a tenth of the range, and a tenth more light."""
    return _to_levels(pixels * 1.1 + 25)


def rotation(pixels: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """By 10° to either side; corners are filled from the border."""
    height, width = pixels.shape[:2]
    turn = cv2.getRotationMatrix2D(((width - 1) / 2, (height - 1) / 2), generator.choice([-10, 10]), 1)
    return cv2.warpAffine(pixels, turn, (width, height), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)


CORRUPTIONS: dict[str, Corruption] = {
    "blur": blur,
    "JPEG at quality 25": jpeg,
    "noise": noise,
    "darker": darker,
    "brighter": brighter,
    "rotated by 10°": rotation,
}


def corrupt(pixels: Tensor, corruption: Corruption, seed: int) -> Tensor:
    """A batch (B, 3, height, width) uint8, each image corrupted; what is drawn depends on the seed."""
    generator = np.random.default_rng(seed)
    images = pixels.permute(0, 2, 3, 1).contiguous().numpy()
    made = np.stack([corruption(image, generator) for image in images])
    return torch.from_numpy(made).permute(0, 3, 1, 2)


def _to_levels(values: np.ndarray) -> np.ndarray:
    return values.round().clip(0, 255).astype(np.uint8)
