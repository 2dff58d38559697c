"""How evaluation prepares an image; a checkpoint carries it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from utils.config.train_config import TrainConfig
from utils.data.image_io import OpenImage, open_to_decode

# Where neither the settings nor the weights say anything.
DEFAULTS: dict[str, Any] = {
    "eval_crop": 0.875,
    "interpolation": "bilinear",
    "image_mean": (0.485, 0.456, 0.406),
    "image_std": (0.229, 0.224, 0.225),
}
UNSET = (None, "auto")


def resolve_preprocessing(config: TrainConfig, expected: Mapping[str, Any]) -> TrainConfig:
    """`config` with what it leaves open of `DEFAULTS` as the weights have it that training starts from, or else by
    default.

    Args:
        config: the settings.
        expected: what the weights expect, by the names of the fields; nothing without weights.

    Raises:
        ValueError: a field can't have the value that is expected.
    """
    opened = [name for name in DEFAULTS if getattr(config, name) in UNSET]
    return dataclasses.replace(config, **{name: expected.get(name, DEFAULTS[name]) for name in opened})


@dataclass(frozen=True)
class Preprocessing:
    """How evaluation prepares an image. A checkpoint carries it; the fields are those of `TrainConfig`."""

    max_pixels: int
    allow_truncated: bool
    input_shape: tuple[int, int]
    letterbox_image: bool
    eval_crop: float
    interpolation: str
    image_mean: tuple[float, float, float]
    image_std: tuple[float, float, float]

    @staticmethod
    def from_dict(values: dict[str, Any]) -> Preprocessing:
        """Take the fields out of a checkpoint's preprocessing or a config; other keys are passed over, and fields that
        are left open get their default."""
        plain = {name: DEFAULTS[name] if values[name] in UNSET else values[name] for name in PREPROCESSING_FIELDS}
        return Preprocessing(**{name: tuple(v) if isinstance(v, list) else v for name, v in plain.items()})

    @staticmethod
    def of(config: TrainConfig) -> Preprocessing:
        """That of a run with these settings."""
        return Preprocessing.from_dict({name: getattr(config, name) for name in PREPROCESSING_FIELDS})

    def open(self, path: str) -> AbstractContextManager[OpenImage]:
        """An image file, to decode a part of; see `utils.data.image_io.open_image` for what it raises."""
        return open_to_decode(path, self.max_pixels, self.allow_truncated)

    def as_dict(self) -> dict[str, Any]:
        """The fields as plain types."""
        values = dataclasses.asdict(self)
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


PREPROCESSING_FIELDS = tuple(field.name for field in dataclasses.fields(Preprocessing))
