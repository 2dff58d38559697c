"""Metadata of a field of the config, declared at the field."""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin


@dataclass(frozen=True)
class Valid:
    """A check of a value, and what to do if it fails."""

    test: Callable[[Any], bool]
    remedy: str


BELOW_1 = Valid(lambda value: 0 <= value < 1, "must be at least 0 and below 1")
SHARE = Valid(lambda value: 0 <= value <= 1, "must be between 0 and 1")
ABOVE_0_TO_1 = Valid(lambda value: 0 < value <= 1, "must be above 0 and at most 1")
ABOVE_0 = Valid(lambda value: value > 0, "must be above 0")
FROM_0 = Valid(lambda value: value >= 0, "must be 0 or more")
FROM_1 = Valid(lambda value: value >= 1, "must be an integer of 1 or more")
SIZE = Valid(lambda value: min(value) > 0, "must be height and width in pixels")


@dataclass(frozen=True)
class Setting:
    """Metadata of a field besides its type, default and docstring.

    Attributes:
        valid: test of its values; None: all values of its type are valid.
        plain: its default without a recipe.
        by_recipe: whether a recipe may choose it; its default is then None.
        resumable: whether a resumed run may change it; the other fields affect the result of the run.
        shapes_images: whether it affects the pixels that the network sees, and so cached features.
    """

    valid: Valid | None
    plain: Any
    by_recipe: bool
    resumable: bool
    shapes_images: bool


def setting(
    default: Any,
    valid: Valid | None = None,
    *,
    by_recipe: bool = False,
    resumable: bool = False,
    shapes_images: bool = False,
) -> Any:
    """Declare a field of the config with this default; see `Setting`."""
    spec = Setting(valid, default, by_recipe, resumable, shapes_images)
    return dataclasses.field(default=None if by_recipe else default, metadata={"setting": spec})


def is_file_name(name: str) -> bool:
    """Whether a file on any system can be called `name`, or it is empty. Letters of all scripts are allowed."""
    return len(name.encode()) <= 100 and all(char.isalnum() or char in "-_" for char in name)


def lists_to_tuples(config: Any) -> None:
    """Turn lists (from JSON) in the fields of a frozen dataclass into tuples."""
    for field in dataclasses.fields(config):
        if isinstance(value := getattr(config, field.name), list):
            object.__setattr__(config, field.name, tuple(value))


def to_plain(value: Any) -> Any:
    """Convert tuples in nested dicts and tuples into lists, as in JSON."""
    if isinstance(value, dict):
        return {name: to_plain(item) for name, item in value.items()}
    return [to_plain(item) for item in value] if isinstance(value, tuple | list) else value


def has_type(value: object, hint: Any, finite: bool = True) -> bool:
    """Whether `value` has the type `hint`. Integers count as floats, lists as tuples; NaN and infinity count as floats
    unless `finite`."""
    args = get_args(hint)
    if hint is Any:
        return True
    if get_origin(hint) is list:
        return type(value) is list and all(has_type(item, args[0], finite) for item in value)
    if get_origin(hint) is dict:
        return type(value) is dict and all(
            has_type(key, args[0]) and has_type(item, args[1], finite) for key, item in value.items()
        )
    if get_origin(hint) is Literal:
        return value in args
    if get_origin(hint) in (Union, UnionType):
        return any(has_type(value, arg, finite) for arg in args)
    if get_origin(hint) is tuple and args[-1] is Ellipsis:
        return isinstance(value, tuple | list) and all(has_type(item, args[0]) for item in value)
    if get_origin(hint) is tuple:
        return isinstance(value, tuple | list) and len(value) == len(args) and all(map(has_type, value, args))
    if hint is float:
        if type(value) is int:
            return abs(value) <= sys.float_info.max
        return isinstance(value, float) and (math.isfinite(value) or not finite)
    return value is None if hint is type(None) else type(value) is hint
