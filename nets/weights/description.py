"""Read the JSON files that timm and Hugging Face write beside weights: network variant and preprocessing.

A file `x.safetensors` is described by `x.config.json` beside it; and by `config.json` if its name is that of weights on
the hub, or if it is the only file of weights in its folder. The same holds for `preprocessor_config.json`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nets.weights.hub import DESCRIPTIONS, FILE_SUFFIXES, HUB_FILES

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


def read_variant(weights: Path) -> dict[str, Any]:
    """Return arguments of `nets.vit.vit` from Hugging Face's `config.json` of a file; invalid values are ignored.

    Raises:
        ValueError: the activation is not a GELU.
    """
    path = _describing(weights, "config.json")
    config = _read_json(path)
    variant: dict[str, Any] = {}
    if isinstance(name := config.get("hidden_act"), str):
        if name not in ACTIVATIONS:
            raise ValueError(f"{path} has hidden_act={name!r:.40}, which the ViT doesn't support")
        variant["activation"] = ACTIVATIONS[name]
    if _is_fraction(epsilon := config.get("layer_norm_eps")):
        variant["norm_eps"] = float(epsilon)
    return variant


def read_preprocessing(weights: Path) -> dict[str, Any]:
    """Return the fields in `PREPROCESSING` from timm's `config.json` and Hugging Face's `preprocessor_config.json` of a
    file."""
    config, processor = (_read_json(_describing(weights, name)) for name in DESCRIPTIONS)
    return valid_fields(_of_hugging_face(processor) | _of_timm(config.get("pretrained_cfg")))


def _describing(weights: Path, name: str) -> Path:
    """Return the path of the JSON file `name` that belongs to a file of weights, which may not exist."""
    own, shared = weights.with_name(f"{weights.stem}.{name}"), weights.with_name(name)
    if own.is_file() or not shared.is_file():
        return own
    others = (path for path in weights.parent.iterdir() if path != weights and path.suffix in FILE_SUFFIXES)
    return shared if weights.name in HUB_FILES or not any(others) else own


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
