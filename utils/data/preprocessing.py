"""The preprocessing of images for evaluation and prediction, stored in each checkpoint."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from utils.config.train_config import TrainConfig
from utils.data.image_io import OpenImage, open_to_decode

# Used where neither the config nor the pretrained weights set a value.
DEFAULTS: dict[str, Any] = {
    "eval_crop": 0.875,
    "interpolation": "bilinear",
    "image_mean": (0.485, 0.456, 0.406),
    "image_std": (0.229, 0.224, 0.225),
}
UNSET = (None, "auto")


def resolve_preprocessing(config: TrainConfig, expected: Mapping[str, Any]) -> TrainConfig:
    """Return `config` with unset preprocessing fields filled from the pretrained weights, else from `DEFAULTS`.

    Args:
        config: the settings.
        expected: the values that the weights expect, by field; empty without weights.

    Raises:
        ValueError: an expected value is invalid for its field.
    """
    unset = [name for name in DEFAULTS if getattr(config, name) in UNSET]
    return dataclasses.replace(config, **{name: expected.get(name, DEFAULTS[name]) for name in unset})


@dataclass(frozen=True)
class Preprocessing:
    """The preprocessing settings; the fields are those of `TrainConfig`."""

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
        """Create it from the keys of a checkpoint or a config; unset fields get their default."""
        plain = {name: DEFAULTS[name] if values[name] in UNSET else values[name] for name in PREPROCESSING_FIELDS}
        return Preprocessing(**{name: tuple(v) if isinstance(v, list) else v for name, v in plain.items()})

    @staticmethod
    def from_config(config: TrainConfig) -> Preprocessing:
        """Return the preprocessing of a run with this config."""
        return Preprocessing.from_dict({name: getattr(config, name) for name in PREPROCESSING_FIELDS})

    def open(self, path: str) -> AbstractContextManager[OpenImage]:
        """Open an image file for decoding; see `utils.data.image_io.open_image` for the errors."""
        return open_to_decode(path, self.max_pixels, self.allow_truncated)

    def as_dict(self) -> dict[str, Any]:
        """Return the fields as plain types."""
        values = dataclasses.asdict(self)
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


PREPROCESSING_FIELDS = tuple(field.name for field in dataclasses.fields(Preprocessing))
