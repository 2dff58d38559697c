"""Read files of weights of any supported project and load them into our networks, completely or with an error."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from nets.arguments import check_arguments
from nets.network import FreezableNetwork
from nets.weights.convert import convert_names, unwrap
from nets.weights.description import read_preprocessing, read_variant, valid_fields
from nets.weights.digest import digest_file
from nets.weights.hub import WeightsFile
from nets.weights.license import UNKNOWN, clean_license, warning_of
from nets.weights.safe_load import open_safely, read_header
from nets.weights.sources import State, recognize
from nets.weights.tree import DTYPES


@dataclass(frozen=True)
class Weights:
    """A state dict and what is known about its network.

    Attributes:
        path: the file.
        source: the project, for messages.
        state: the tensors; those of a ViT under the names of `nets.vit`, others under their own names.
        variant: arguments of `nets.vit.vit` that differ from its defaults.
        preprocessing: what the weights expect of images, as config fields, where known.
        input_shape: image height and width of the weights; None: a square.
        resampling: arguments of `F.interpolate` for the position embedding.
        excluded: names of tensors that a classifier doesn't need.
        class_names: names of the head's outputs, where known.
        origin: file and SHA-256; for downloads also repository and revision, or URL; license, where known.
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
        """Return the rows and columns of patches in the position embedding.

        Raises:
            ValueError: the input shape is unknown, and the number of patches is not a square.
        """
        if self.input_shape:
            patch = self.state["patch_embed.proj.weight"].shape[-1]
            return (self.input_shape[0] // patch, self.input_shape[1] // patch)
        patches = self.state["pos_embed"].shape[1] - 1
        side = math.isqrt(patches)
        if side * side != patches:
            raise ValueError(
                f"{self.path}: its position embedding has {patches} patches, which is not a square, and a state dict "
                f"doesn't contain the input_shape; use a checkpoint of Thaw, or weights of a square input_shape"
            )
        return (side, side)


BUBBLIIIING_FILE = "vit-patch_16.pth"
"""The file of bubbliiiing's classification-pytorch, trained with the tanh GELU. Its tensors have timm's names, so it is
recognized by its file name."""


def read_weights(file: str | Path | WeightsFile, of_vit: bool = True) -> Weights:
    """Read a `.safetensors`, `.npz` or torch file: a checkpoint of Thaw, a ViT of one of `SOURCES`, or other tensors.

    Args:
        file: the file. A description by timm or Hugging Face beside it is read too, see `nets.weights.description`.
        of_vit: whether the weights are for `nets.vit`. If not, names are unchanged, since many of timm's networks have
            tensors with the names of a ViT's.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it can't be opened, contains code or no state dict, or its network has parts that ours lacks.
    """
    file = file if isinstance(file, WeightsFile) else WeightsFile(Path(file))
    path = file.path
    content = open_safely(path)
    origin = {"file": str(path), "sha256": digest_file(path), **file.origin}
    if isinstance(content, dict) and isinstance(content.get("weights"), dict):
        return _read_own(path, content["weights"], content, origin, of_vit)
    if metadata := _read_export_metadata(path):
        return _read_own(path, content, metadata, origin, of_vit)
    try:
        state, wrapped = unwrap(content)
        source = recognize(state, wrapped) if of_vit else None
        described_preprocessing = dict(file.preprocessing) | read_preprocessing(path)
        if source is None:
            _check_tensors(state)
            return Weights(path, "a network's own names", state, preprocessing=described_preprocessing, origin=origin)
        state, excluded = convert_names(state, source)
        _check_tensors(state)
        described_variant = read_variant(path)
    except (ValueError, IndexError, RuntimeError) as error:  # tensors may have unexpected shapes
        raise ValueError(f"{path} can't be used: {error}") from error
    variant = dict(source.variant)
    if path.name == BUBBLIIIING_FILE:
        variant["activation"] = "gelu_tanh"
    if "reg_token" in state:
        variant["num_registers"] = state["reg_token"].shape[1]
    return Weights(
        path,
        source.name if path.name != BUBBLIIIING_FILE else f"bubbliiiing's {BUBBLIIIING_FILE}",
        state,
        variant | described_variant,
        dict(source.preprocessing) | described_preprocessing,
        resampling=source.resampling,
        excluded=tuple(excluded),
        origin=origin,
    )


def _read_own(
    path: Path, state: State, metadata: Mapping[str, Any], origin: Mapping[str, str], of_vit: bool
) -> Weights:
    """Return the weights of a checkpoint of Thaw, or of its export, whose metadata describe network and images."""
    arguments, preprocessing = metadata.get("model"), metadata.get("preprocessing")
    if not isinstance(arguments, dict) or not isinstance(arguments.get("input_shape"), list):
        raise ValueError(f"{path} can't be used: it has the layout of a checkpoint of Thaw, but no input_shape")
    names = metadata.get("class_names", [])
    before = metadata.get("origin")
    if isinstance(before, dict) and "license" not in origin and (license := clean_license(before.get("license"))):
        origin = {**origin, "license": license}  # of the weights that the checkpoint's run started from
    try:
        check_arguments(arguments)
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise ValueError("its class_names are not a list of text")
        if not all(isinstance(tensor, Tensor) for tensor in state.values()):
            raise ValueError("some of its weights are not tensors")
        _check_tensors(state)
        sides = arguments["input_shape"]
        variant = {name: value for name, value in arguments.items() if name in VARIANT}
        registers = state["reg_token"].shape[1] if "reg_token" in state else 0
        if variant.get("num_registers", registers) != registers:
            raise ValueError(f"num_registers={variant['num_registers']}: it has {registers}")
        if "pos_embed" in state:
            patch = state["patch_embed.proj.weight"].shape[-1]
            if (sides[0] // patch) * (sides[1] // patch) != state["pos_embed"].shape[1] - 1:
                raise ValueError(f"its position embedding is not for its input_shape, {sides[0]} x {sides[1]} pixels")
    except ValueError as error:
        raise ValueError(f"{path} can't be used: {error}") from error
    return Weights(
        path,
        "a Thaw checkpoint",
        state,
        variant if of_vit else {},
        valid_fields(preprocessing) if isinstance(preprocessing, dict) else {},
        input_shape=(sides[0], sides[1]),
        class_names=tuple(names),
        origin=origin,
    )


VARIANT = ("activation", "norm_eps", "num_registers")
"""Arguments of `nets.vit.vit` in a checkpoint that its weights decide."""

DIMENSIONS = {"pos_embed": 3, "reg_token": 3, "patch_embed.proj.weight": 4, "head.bias": 1}


def _check_tensors(state: State) -> None:
    """Raise a ValueError if a tensor is of a type that weights don't have, or if one whose shape is read later has the
    wrong number of dimensions."""
    for name, tensor in state.items():
        if tensor.dtype not in DTYPES:
            raise ValueError(f"its {name} is of type {tensor.dtype}, which isn't one of plain weights")
    for name, dimensions in DIMENSIONS.items():
        tensor = state.get(name)
        if tensor is not None and (tensor.ndim != dimensions or 0 in tensor.shape):
            raise ValueError(f"its {name} has the shape {tuple(tensor.shape)}, not {dimensions} dimensions")
    if "pos_embed" in state and (state["pos_embed"].shape[1] < 2 or "patch_embed.proj.weight" not in state):
        raise ValueError("it has a position embedding without patches")


def _read_export_metadata(path: Path) -> dict[str, Any]:
    """Return the metadata of a `.safetensors` file written by export.py, as in a checkpoint; empty for other files."""
    header = read_header(path)
    try:
        return {name: json.loads(header[name]) for name in ("model", "preprocessing", "class_names")}
    except (KeyError, ValueError, RecursionError):
        return {}


def load_weights(model: FreezableNetwork, weights: Weights, class_names: Sequence[str] = ()) -> None:
    """Load `weights` into `model`.

    All names and shapes must match, with three exceptions, each of which is printed: a position embedding for another
    grid is resampled; a head for other classes is excluded, and the model keeps its own; tensors that a classifier
    doesn't need are excluded.

    Raises:
        ValueError: names or shapes differ; the message lists the first differences.
    """
    own, state = model.state_dict(), model.to_own_names(dict(weights.state))
    variant = ", ".join(f"{name} {value}" for name, value in weights.variant.items())
    print(f"weights   {weights.path} ({weights.source}{f': {variant}' if variant else ''})")
    license = weights.origin.get("license", "")
    print(f"          license: {license or UNKNOWN}")
    if warning := warning_of(license):
        print(f"warning: {warning}")
    # This counter is not used here, and files from before torch 0.4.1 don't have it.
    state |= {name: own[name] for name in own.keys() - state.keys() if name.endswith(".num_batches_tracked")}
    if weights.excluded:
        names = ", ".join(weights.excluded[:3]) + (", ..." if len(weights.excluded) > 3 else "")
        print(f"          {len(weights.excluded)} tensors that a classifier doesn't need are excluded: {names}")
    if {"pos_embed", "patch_embed.proj.weight"} <= state.keys() & own.keys() and weights.grid() != model.grid:
        state["pos_embed"] = model.resample_positions(state["pos_embed"], weights.grid(), **weights.resampling)
        print(f"          position embedding resampled to {model.grid[0]} x {model.grid[1]} patches")
    head = {name for name in own if name.startswith("head.")}
    others = weights.class_names and class_names and weights.class_names != tuple(class_names)
    if others or any(name not in state or state[name].shape != own[name].shape for name in head):
        outputs = f"{len(state['head.bias'])}{' other' if others else ''}" if "head.bias" in state else "no"
        num_classes = len(own["head.bias"])
        print(f"          its head of {outputs} classes isn't loaded; the new head has {num_classes} classes")
        state = {name: value for name, value in state.items() if name not in head} | {name: own[name] for name in head}
    check_fit(own, state, weights.path)
    model.load_state_dict(state)


def check_fit(own: State, state: State, path: Path) -> None:
    """Raise a ValueError that lists the first differences in names and shapes, if there are any."""
    differences = {
        "missing": [name for name in own if name not in state],
        "unexpected": [name for name in state if name not in own],
        "of another shape": [
            f"{name} {tuple(state[name].shape)} for {tuple(value.shape)}"
            for name, value in own.items()
            if name in state and state[name].shape != value.shape
        ],
    }
    if any(differences.values()):
        message = "; ".join(
            f"{len(names)} {kind}: {', '.join(names[:3])}" for kind, names in differences.items() if names
        )
        raise ValueError(f"{path} doesn't fit this network ({message}): check backbone and input_shape")
