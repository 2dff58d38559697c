"""Mild image corruptions, to measure robustness: blur, compression, noise, brightness, rotation.

After Hendrycks and Dietterich, 2019, https://arxiv.org/abs/1903.12261, at about their lowest severity, which does not
change what a person would see in an image. They are applied after resizing, to the network's input.
"""

from __future__ import annotations

from collections.abc import Callable

import cv2
import numpy as np
import torch
from torch import Tensor

Corruption = Callable[[np.ndarray, np.random.Generator], np.ndarray]
"""A function of pixels uint8 (height, width, 3) that returns pixels of the same shape."""


def blur(pixels: np.ndarray, _: np.random.Generator) -> np.ndarray:
    """Gaussian blur with a standard deviation of 1 pixel per 112 pixels of the longer side."""
    return cv2.GaussianBlur(pixels, (0, 0), max(pixels.shape[:2]) / 112)


def jpeg(pixels: np.ndarray, _: np.random.Generator) -> np.ndarray:
    """JPEG compression at quality 25."""
    _, encoded = cv2.imencode(".jpg", cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, 25])
    return cv2.cvtColor(cv2.imdecode(encoded, cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB)


def noise(pixels: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Gaussian noise with a standard deviation of 8 % of the value range."""
    return _to_uint8(pixels + generator.normal(0, 0.08 * 255, pixels.shape))


def darker(pixels: np.ndarray, _: np.random.Generator) -> np.ndarray:
    """Brightness times 0.75."""
    return _to_uint8(pixels * 0.75)


def brighter(pixels: np.ndarray, _: np.random.Generator) -> np.ndarray:
    """Brightness times 1.1, plus a tenth of the value range."""
    return _to_uint8(pixels * 1.1 + 25)


def rotation(pixels: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Rotation by 10° in either direction; corners repeat the border."""
    height, width = pixels.shape[:2]
    matrix = cv2.getRotationMatrix2D(((width - 1) / 2, (height - 1) / 2), generator.choice([-10, 10]), 1)
    return cv2.warpAffine(pixels, matrix, (width, height), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)


CORRUPTIONS: dict[str, Corruption] = {
    "blur": blur,
    "JPEG at quality 25": jpeg,
    "noise": noise,
    "darker": darker,
    "brighter": brighter,
    "rotated by 10°": rotation,
}


def corrupt(pixels: Tensor, corruption: Corruption, seed: int) -> Tensor:
    """The batch uint8 (B, 3, height, width) with each image corrupted, reproducible by the seed."""
    generator = np.random.default_rng(seed)
    images = pixels.permute(0, 2, 3, 1).contiguous().numpy()
    corrupted = np.stack([corruption(image, generator) for image in images])
    return torch.from_numpy(corrupted).permute(0, 3, 1, 2)


def _to_uint8(values: np.ndarray) -> np.ndarray:
    return values.round().clip(0, 255).astype(np.uint8)
