"""Read the JSON files that timm and Hugging Face write beside weights: network variant and preprocessing."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

ACTIVATIONS = {"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"}
"""Activation names of Hugging Face -> `nets.vit.ACTIVATIONS`."""
FILTERS = {2: "bilinear", 3: "bicubic"}
"""Pillow's filter numbers, as in files of Hugging Face."""


def _is_fraction(value: Any) -> bool:
    return type(value) in (int, float) and 0 < value <= 1


def _is_mean(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 3 and all(v == 0 or _is_fraction(v) for v in value)


PREPROCESSING: dict[str, Callable[[Any], bool]] = {
    "image_mean": _is_mean,
    "image_std": lambda value: _is_mean(value) and all(value),
    "interpolation": lambda value: value in FILTERS.values(),
    "eval_crop": _is_fraction,
}
"""Config fields that a description may set, and a check of their values."""


def read_variant(folder: Path) -> dict[str, Any]:
    """Return arguments of `nets.vit.vit` from Hugging Face's `config.json` in `folder`; invalid values are ignored.

    Raises:
        ValueError: the activation is not a GELU.
    """
    config = _read_json(folder / "config.json")
    variant: dict[str, Any] = {}
    if isinstance(name := config.get("hidden_act"), str):
        if name not in ACTIVATIONS:
            raise ValueError(f"{folder / 'config.json'} has hidden_act={name!r:.40}, which the ViT doesn't support")
        variant["activation"] = ACTIVATIONS[name]
    if _is_fraction(epsilon := config.get("layer_norm_eps")):
        variant["norm_eps"] = float(epsilon)
    return variant


def read_preprocessing(folder: Path) -> dict[str, Any]:
    """Return the fields in `PREPROCESSING` from timm's `config.json` and Hugging Face's `preprocessor_config.json`."""
    config, processor = _read_json(folder / "config.json"), _read_json(folder / "preprocessor_config.json")
    return valid_fields(_of_hugging_face(processor) | _of_timm(config.get("pretrained_cfg")))


def valid_fields(fields: dict[str, Any]) -> dict[str, Any]:
    """Return the fields that are in `PREPROCESSING` and have a valid value."""
    return {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in fields.items()
        if name in PREPROCESSING and PREPROCESSING[name](value)
    }


def _of_hugging_face(processor: dict[str, Any]) -> dict[str, Any]:
    size, crop = _short_side(processor.get("size")), _short_side(processor.get("crop_size"))
    fields = {"image_mean": processor.get("image_mean"), "image_std": processor.get("image_std")}
    if (number := processor.get("resample")) in (2, 3):
        fields["interpolation"] = FILTERS[number]
    if size:
        fields["eval_crop"] = crop / size if crop and processor.get("do_center_crop", True) else 1.0
    return fields


def _of_timm(pretrained_cfg: Any) -> dict[str, Any]:
    names = {"mean": "image_mean", "std": "image_std", "interpolation": "interpolation", "crop_pct": "eval_crop"}
    fields = pretrained_cfg if isinstance(pretrained_cfg, dict) else {}
    return {names[name]: value for name, value in fields.items() if name in names}


def _short_side(size: Any) -> float | None:
    if isinstance(size, dict):
        size = size.get("shortest_edge", size.get("height"))
    return size if isinstance(size, int | float) and size > 0 else None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}
