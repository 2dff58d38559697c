"""What timm and Hugging Face write beside a file of weights: how the network differs, and what images it expects."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

ACTIVATIONS = {"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"}
"""Hugging Face's names for kinds of GELU, and ours."""
FILTERS = {2: "bilinear", 3: "bicubic"}
"""Pillow's numbers for its filters, which Hugging Face's files have."""


def _is_share(value: Any) -> bool:
    return type(value) in (int, float) and 0 < value <= 1


def _is_mean(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 3 and all(v == 0 or _is_share(v) for v in value)


PREPROCESSING: dict[str, Callable[[Any], bool]] = {
    "image_mean": _is_mean,
    "image_std": lambda value: _is_mean(value) and all(value),
    "interpolation": lambda value: value in FILTERS.values(),
    "eval_crop": _is_share,
}
"""What a description may say of images, as the config calls it, and which values are taken."""


def read_variant(folder: Path) -> dict[str, Any]:
    """What Hugging Face's `config.json` in `folder` says of a ViT, as arguments of `nets.vit.vit`. What can't be read,
    or makes no sense, says nothing.

    Raises:
        ValueError: the network has another activation than a GELU.
    """
    config = _read_json(folder / "config.json")
    variant: dict[str, Any] = {}
    if isinstance(kind := config.get("hidden_act"), str):
        if kind not in ACTIVATIONS:
            raise ValueError(f"{folder / 'config.json'} says hidden_act={kind!r:.40}, which the ViT here hasn't")
        variant["activation"] = ACTIVATIONS[kind]
    if _is_share(epsilon := config.get("layer_norm_eps")):
        variant["norm_eps"] = float(epsilon)
    return variant


def read_preprocessing(folder: Path) -> dict[str, Any]:
    """What timm's `config.json` and Hugging Face's `preprocessor_config.json` in `folder` say of images: the fields
    in `PREPROCESSING`."""
    config, processor = _read_json(folder / "config.json"), _read_json(folder / "preprocessor_config.json")
    return known_fields(_of_hugging_face(processor) | _of_timm(config.get("pretrained_cfg")))


def known_fields(found: dict[str, Any]) -> dict[str, Any]:
    """Those of `found` that are in `PREPROCESSING` and make sense, as plain types."""
    return {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in found.items()
        if name in PREPROCESSING and PREPROCESSING[name](value)
    }


def _of_hugging_face(processor: dict[str, Any]) -> dict[str, Any]:
    size, crop = _short_side(processor.get("size")), _short_side(processor.get("crop_size"))
    found = {"image_mean": processor.get("image_mean"), "image_std": processor.get("image_std")}
    if (number := processor.get("resample")) in (2, 3):
        found["interpolation"] = FILTERS[number]
    if size:
        found["eval_crop"] = crop / size if crop and processor.get("do_center_crop", True) else 1.0
    return found


def _of_timm(pretrained_cfg: Any) -> dict[str, Any]:
    names = {"mean": "image_mean", "std": "image_std", "interpolation": "interpolation", "crop_pct": "eval_crop"}
    known = pretrained_cfg if isinstance(pretrained_cfg, dict) else {}
    return {names[name]: value for name, value in known.items() if name in names}


def _short_side(size: Any) -> float | None:
    if isinstance(size, dict):
        size = size.get("shortest_edge", size.get("height"))
    return size if isinstance(size, int | float) and size > 0 else None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
