"""Whether values are of the types that fields are said to be of, and fields as JSON has them."""

from __future__ import annotations

import dataclasses
import math
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin


def make_tuples(config: Any) -> None:
    """Turn the fields that are lists, as JSON has them, into tuples, so that equal settings are equal."""
    for field in dataclasses.fields(config):
        if isinstance(value := getattr(config, field.name), list):
            object.__setattr__(config, field.name, tuple(value))


def plain(value: Any) -> Any:
    """Nested dicts and tuples, these as lists."""
    if isinstance(value, dict):
        return {name: plain(item) for name, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, tuple | list) else value


def fits(value: object, hint: Any) -> bool:
    """Whether `value` is of the type `hint`; whole numbers pass for floats, lists for tuples, nan and inf don't."""
    args = get_args(hint)
    if get_origin(hint) is Literal:
        return value in args
    if get_origin(hint) in (Union, UnionType):
        return any(fits(value, arg) for arg in args)
    if get_origin(hint) is tuple and args[-1] is Ellipsis:
        return isinstance(value, tuple | list) and all(fits(item, args[0]) for item in value)
    if get_origin(hint) is tuple:
        return isinstance(value, tuple | list) and len(value) == len(args) and all(map(fits, value, args))
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return type(value) is hint
