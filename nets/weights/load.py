"""Files of weights, whoever wrote them, into our networks: all of them, or an error."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from nets.network import FreezableNetwork
from nets.weights.convert import convert_names, unwrap
from nets.weights.description import ACTIVATIONS, known_fields, read_preprocessing, read_variant
from nets.weights.hub import Found
from nets.weights.safe_load import open_safely, read_header
from nets.weights.seal import digest_file
from nets.weights.sources import State, recognise


@dataclass(frozen=True)
class Weights:
    """Tensors by name, and what is known of the network that they are of.

    Attributes:
        path: the file.
        source: whose they are, for messages.
        state: under the names of the networks here, if they are a ViT's, else under their own.
        variant: how their network differs from ours by default: arguments of `nets.vit.vit`.
        preprocessing: what they expect of images, by the names of the config's fields, as far as it is known.
        input_shape: height and width of the images that they are for; None: a square.
        resampling: how their position embedding is resampled, as arguments of `F.interpolate`.
        excluded: names of tensors that a classifier has no use for.
        class_names: what the outputs of their head mean, as far as it is known.
        origin: where they are from: file, SHA-256, and repository and revision of what was downloaded.
    """

    path: Path
    source: str
    state: State
    variant: Mapping[str, Any] = field(default_factory=dict)
    preprocessing: Mapping[str, Any] = field(default_factory=dict)
    input_shape: tuple[int, int] | None = None
    resampling: Mapping[str, bool] = field(default_factory=dict)
    excluded: tuple[str, ...] = ()
    class_names: tuple[str, ...] = ()
    origin: Mapping[str, str] = field(default_factory=dict)

    def grid(self) -> tuple[int, int]:
        """Patches down and across that the position embedding is for: a square, unless the input shape tells.

        Raises:
            ValueError: nothing tells, and they are no square.
        """
        if self.input_shape:
            patch = self.state["patch_embed.proj.weight"].shape[-1]
            return (self.input_shape[0] // patch, self.input_shape[1] // patch)
        patches = self.state["pos_embed"].shape[1] - 1
        side = math.isqrt(patches)
        if side * side != patches:
            raise ValueError(
                f"{self.path}: a position embedding of {patches} patches is no square, and a state dict doesn't tell "
                f"what it is: use a checkpoint of Thaw, or weights of a square input_shape"
            )
        return (side, side)


# The file of bubbliiiing's classification-pytorch, made for the tanh GELU. Its tensors have timm's names, so that only
# its own name tells it.
LAYOUT_FILE = "vit-patch_16.pth"


def read_weights(file: str | Path | Found, of_vit: bool = True) -> Weights:
    """The weights in a file (`.safetensors`, `.npz`, or saved by torch): those of a checkpoint of Thaw, a ViT's of one
    of `nets.weights.sources.SOURCES`, recognised by the names of its tensors, or any other network's under its own
    names.

    Args:
        file: the file, and where it was downloaded from. A `config.json` and `preprocessor_config.json` beside it, as
            timm and Hugging Face write them, say what the weights expect.
        of_vit: whether they are for `nets.vit`; else names stay as they are, for many networks of timm's have tensors
            named as a ViT's.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it can't be opened, would run code, holds no tensors by name, or is of a network that has what ours
            hasn't.
    """
    path, downloaded = (file.path, file.origin) if isinstance(file, Found) else (Path(file), {})
    content = open_safely(path)
    origin = {"file": str(path), "sha256": digest_file(path), **downloaded}
    if isinstance(content, dict) and isinstance(content.get("weights"), dict):
        return _of_thaw(path, content["weights"], content, origin, of_vit)
    if described := _read_export(path):
        return _of_thaw(path, content, described, origin, of_vit)
    try:
        state, wrapped = unwrap(content)
        source = recognise(state, wrapped) if of_vit else None
        told_preprocessing = read_preprocessing(path.parent)
        if source is None:
            return Weights(path, "a network's own names", state, preprocessing=told_preprocessing, origin=origin)
        state, excluded = convert_names(state, source)
        _check_dimensions(state)
        told_variant = read_variant(path.parent)
    except (ValueError, IndexError, RuntimeError) as error:  # tensors of other shapes than their names promise
        raise ValueError(f"{path} can't be used: {error}") from error
    variant = dict(source.variant)
    if path.name == LAYOUT_FILE:
        variant["activation"] = "gelu_tanh"
    if "reg_token" in state:
        variant["num_registers"] = state["reg_token"].shape[1]
    return Weights(
        path,
        source.name if path.name != LAYOUT_FILE else f"bubbliiiing's {LAYOUT_FILE}",
        state,
        variant | told_variant,
        dict(source.preprocessing) | told_preprocessing,
        resampling=source.resampling,
        excluded=tuple(excluded),
        origin=origin,
    )


def _of_thaw(
    path: Path, state: State, described: Mapping[str, Any], origin: Mapping[str, str], of_vit: bool
) -> Weights:
    """Those of a checkpoint, or of an export of one, which say what network and what images they are for."""
    arguments, preprocessing = described.get("model"), described.get("preprocessing")
    sides = arguments.get("input_shape") if isinstance(arguments, dict) else None
    if not (isinstance(sides, list) and len(sides) == 2 and all(type(side) is int for side in sides)):
        raise ValueError(f"{path} can't be used: it is no checkpoint of Thaw, though its weights are stored as in one")
    try:
        if not all(isinstance(tensor, Tensor) for tensor in state.values()):
            raise ValueError("its weights aren't all tensors")
        _check_dimensions(state)
        variant = {name: value for name, value in arguments.items() if name not in OF_EVERY_NETWORK}
        if unknown := variant.keys() - VARIANT.keys():
            raise ValueError(f"it says {', '.join(map(repr, sorted(unknown)))} of its network, which isn't known here")
        if wrong := [name for name, value in variant.items() if not VARIANT[name](value, state)]:
            raise ValueError(f"its network can't have {', '.join(f'{name}={variant[name]!r:.40}' for name in wrong)}")
        if "pos_embed" in state:
            patch = state["patch_embed.proj.weight"].shape[-1]
            if (sides[0] // patch) * (sides[1] // patch) != state["pos_embed"].shape[1] - 1:
                raise ValueError(
                    f"its position embedding isn't one for the {sides[0]} x {sides[1]} pixels that it says"
                )
    except ValueError as error:
        raise ValueError(f"{path} can't be used: {error}") from error
    return Weights(
        path,
        "Thaw's",
        state,
        variant if of_vit else {},
        known_fields(preprocessing) if isinstance(preprocessing, dict) else {},
        input_shape=(sides[0], sides[1]),
        class_names=tuple(names) if isinstance(names := described.get("class_names"), list) else (),
        origin=origin,
    )


def _num_registers(state: State) -> int:
    return state["reg_token"].shape[1] if "reg_token" in state else 0


VARIANT: dict[str, Callable[[Any, State], bool]] = {
    "activation": lambda value, _: value in ACTIVATIONS.values(),
    "norm_eps": lambda value, _: type(value) is float and 0 < value < 1,
    "num_registers": lambda value, state: type(value) is int and value == _num_registers(state),
}
"""What a file of Thaw's says of a ViT's network, and whether that can be so."""

OF_EVERY_NETWORK = ("name", "num_classes", "input_shape")

DIMENSIONS = {"pos_embed": 3, "reg_token": 3, "patch_embed.proj.weight": 4, "head.bias": 1}


def _check_dimensions(state: State) -> None:
    """Raise a ValueError if a tensor that is looked into isn't of the kind that its name promises."""
    for name, dimensions in DIMENSIONS.items():
        tensor = state.get(name)
        if tensor is not None and (tensor.ndim != dimensions or 0 in tensor.shape):
            raise ValueError(f"{name} in it has the shape {tuple(tensor.shape)}, not {dimensions} dimensions")
    if "pos_embed" in state and (state["pos_embed"].shape[1] < 2 or "patch_embed.proj.weight" not in state):
        raise ValueError("it has a position embedding without patches")


def _read_export(path: Path) -> dict[str, Any]:
    """What a `.safetensors` file of export.py says in its header, as a checkpoint has it; nothing, of any other."""
    header = read_header(path)
    try:
        return {name: json.loads(header[name]) for name in ("model", "preprocessing", "class_names")}
    except (KeyError, ValueError, RecursionError):
        return {}


def load_weights(model: FreezableNetwork, weights: Weights, class_names: Sequence[str] = ()) -> None:
    """Load `weights` into a network of `nets`, strictly but for three things, each of which is printed.

    A position embedding made for another grid of patches is resampled; a head for another number of classes, or for
    others than `class_names` where its own are known, is left out, and the model keeps its own; tensors that a
    classifier has no use for are left out.

    Raises:
        ValueError: names or shapes differ in anything else; the message lists the first of them.
    """
    own, state = model.state_dict(), model.rename_state(dict(weights.state))
    variant = ", ".join(f"{name} {value}" for name, value in weights.variant.items())
    print(f"{weights.path}: {weights.source}{f' ({variant})' if variant else ''}")
    # A counter that nothing here reads; files from before torch 0.4.1 don't have it.
    state |= {name: own[name] for name in own.keys() - state.keys() if name.endswith(".num_batches_tracked")}
    if weights.excluded:
        named = ", ".join(weights.excluded[:3]) + (", ..." if len(weights.excluded) > 3 else "")
        print(f"{weights.path}: {len(weights.excluded)} tensors that a classifier doesn't need are left out: {named}")
    if {"pos_embed", "patch_embed.proj.weight"} <= state.keys() & own.keys() and weights.grid() != model.grid:
        state["pos_embed"] = model.resample_positions(state["pos_embed"], weights.grid(), **weights.resampling)
        print(f"{weights.path}: position embedding resampled to {model.grid[0]} x {model.grid[1]} patches")
    head = {name for name in own if name.startswith("head.")}
    others = weights.class_names and class_names and weights.class_names != tuple(class_names)
    if others or any(name not in state or state[name].shape != own[name].shape for name in head):
        outputs = f"{len(state['head.bias'])}{' other' if others else ''}" if "head.bias" in state else "no"
        print(
            f"{weights.path}: its head of {outputs} classes is left out, ours starts anew with {len(own['head.bias'])}"
        )
        state = {name: value for name, value in state.items() if name not in head} | {name: own[name] for name in head}
    check_fit(own, state, weights.path)
    model.load_state_dict(state)


def check_fit(own: State, state: State, path: Path) -> None:
    """Raise a ValueError that lists the first differences in names and shapes, if there are any."""
    faults = {
        "missing": [name for name in own if name not in state],
        "not ours": [name for name in state if name not in own],
        "of another shape": [
            f"{name} {tuple(state[name].shape)} for {tuple(value.shape)}"
            for name, value in own.items()
            if name in state and state[name].shape != value.shape
        ],
    }
    if any(faults.values()):
        told = "; ".join(f"{len(names)} {kind}: {', '.join(names[:3])}" for kind, names in faults.items() if names)
        raise ValueError(f"{path} doesn't fit this network ({told}): check backbone and input_shape")
