"""The arguments of `nets.factory.build_model`, which files contain, and which values are valid."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

ACTIVATIONS = ("gelu", "gelu_tanh")
"""Those of `nets.vit`."""
MAX_SIDE = 1 << 14
"""Largest height and width of images in pixels."""
MAX_CLASSES = 1_000_000
ARGUMENTS: dict[str, tuple[Any, str]] = {
    "name": (lambda value: type(value) is str, "must be the name of a backbone"),
    "num_classes": (lambda value: _is_count(value) and 1 <= value <= MAX_CLASSES, "must be the number of classes"),
    "input_shape": (
        lambda value: (
            isinstance(value, list | tuple)
            and len(value) == 2
            and all(_is_count(side) and 1 <= side <= MAX_SIDE for side in value)
        ),
        f"must be height and width, 1 to {MAX_SIDE} pixels",
    ),
    "activation": (
        lambda value: type(value) is str and value in ACTIVATIONS,
        f"must be one of {', '.join(ACTIVATIONS)}",
    ),
    "norm_eps": (lambda value: type(value) is float and 0 < value < 1, "must be a number between 0 and 1"),
    "num_registers": (lambda value: _is_count(value) and 0 <= value <= 1000, "must be an integer from 0 to 1000"),
} | {
    rate: (lambda value: type(value) in (int, float) and 0 <= value < 1, "must be at least 0 and below 1")
    for rate in ("drop_rate", "attn_drop_rate", "drop_path_rate")
}
"""Test of each argument, and what it must be."""


def _is_count(value: Any) -> bool:
    return type(value) is int


def check_arguments(arguments: Mapping[str, Any]) -> None:
    """Raise a ValueError that names the first argument that is unknown, missing or invalid."""
    for name, value in arguments.items():
        if name not in ARGUMENTS:
            raise ValueError(f"a network has no argument {name!r:.40}")
        is_valid, remedy = ARGUMENTS[name]
        if not is_valid(value):
            raise ValueError(f"{name}={value!r:.60}: {remedy}")
    if missing := [name for name in ("name", "num_classes", "input_shape") if name not in arguments]:
        raise ValueError(f"the network's {', '.join(missing)} is missing")
