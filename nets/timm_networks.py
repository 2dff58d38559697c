"""Any network of timm as a `FreezableNetwork`."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from operator import attrgetter
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from nets.division import divide
from nets.network import Part
from nets.wrapped import NETWORK_PREFIX, WrappedNetwork

TIMM = "timm/"
"""Prefix of backbone names that select a network of timm."""


class TimmNetwork(WrappedNetwork):
    """A network of timm: convolutional, or a transformer with tokens.

    Attributes:
        options: with which timm has built it.
    """

    options: dict[str, Any]

    def resize(self, input_shape: Sequence[int]) -> None:
        """See `FreezableNetwork.resize`.

        Raises:
            ValueError: the network has a fixed input size, for example because of position embeddings.
        """
        fixed = _published(self.arguments["name"].removeprefix(TIMM)).fixed_input_size
        if fixed and list(input_shape) != self.arguments["input_shape"]:
            raise ValueError(
                f"stages: {self.arguments['name']} needs one input_shape for the whole run; remove it from the stages"
            )
        super().resize(input_shape)
        parts, features = _take_apart(
            self.network, self.arguments["name"].removeprefix(TIMM), self.options, input_shape
        )
        self._parts, self._feature_map_layer = parts, (features,)

    def to_feature_map(self, x: Tensor) -> Tensor:
        if x.ndim == 3:  # tokens (B, N, C), those of the patches last
            grid = getattr(getattr(self.network, "patch_embed", None), "grid_size", None) or (x.shape[1] + 1, 1)
            if math.prod(grid) > x.shape[1]:  # unknown, or later blocks have fewer patches
                x = x[:, getattr(self.network, "num_prefix_tokens", 0) :]
                side = math.isqrt(x.shape[1])
                grid = (side, side) if side * side == x.shape[1] else (1, x.shape[1])
            return x[:, -math.prod(grid) :].transpose(1, 2).unflatten(2, grid)
        return x.permute(0, 3, 1, 2) if getattr(self.network, "output_fmt", "") == "NHWC" else x

    def undecayed(self) -> set[str]:
        """See `FreezableNetwork.undecayed`; position embeddings, tokens and the like."""
        listed = getattr(self.network, "no_weight_decay", set)()
        return {f"{NETWORK_PREFIX}{name}" for name in listed}

    def to_own_names(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Rename tensors; timm's own filter also updates names of older files and resamples position embeddings."""
        timm_filter = getattr(sys.modules[type(self.network).__module__], "checkpoint_filter_fn", None)
        if timm_filter and not any(name.startswith(NETWORK_PREFIX) for name in state):
            state = timm_filter(state, self.network)
        return super().to_own_names(state)


class Features(nn.Module):
    """`network.forward_features` as a module, which can have hooks."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        return self.network.forward_features(x)


@dataclass(frozen=True)
class Chain:
    """Functions called one after another."""

    functions: tuple[Callable[[Tensor], Tensor], ...]

    def __call__(self, x: Tensor) -> Tensor:
        for function in self.functions:
            x = function(x)
        return x


def build_timm(name: str, num_classes: int, input_shape: Sequence[int], **rates: float) -> TimmNetwork:
    """Build a network of timm with random weights; `name` comes without "timm/".

    Its parts are what comes before the first block, each block, and the rest, see `nets.division.divide`. In a network
    that can't be divided, everything up to the pooling is one part.

    Raises:
        ValueError: timm is not installed or has no such network, the head isn't a single linear layer, or the network
            can't take this input shape.
    """
    # drop_rate 0: some networks apply dropout that `FreezableNetwork` can't disable. We apply it before the head.
    options = {"drop_rate": 0.0, "drop_path_rate": rates["drop_path_rate"]}
    if _published(name).fixed_input_size:
        options["img_size"] = tuple(input_shape)
    try:
        network, ignored = _create(name, num_classes, options), ("attn_drop_rate",)
    except TypeError:  # no stochastic depth
        options.pop("drop_path_rate", None)
        network, ignored = _create(name, num_classes, options), ("attn_drop_rate", "drop_path_rate")
    head, head_name = network.get_classifier(), network.pretrained_cfg["classifier"]
    if not isinstance(head, nn.Linear) or not isinstance(head_name, str):
        raise ValueError(f"backbone='{TIMM}{name}': its head is not a linear layer; choose another backbone")
    if head.bias is None:
        raise ValueError(f"backbone='{TIMM}{name}': its head has no bias; choose another backbone")
    before = network.state_dict().keys()
    network.reset_classifier(0)
    if removed := before - network.state_dict().keys() - {f"{head_name}.weight", f"{head_name}.bias"}:
        raise ValueError(
            f"backbone='{TIMM}{name}': its head is more than a linear layer, it has {min(removed)}; choose another "
            f"backbone"
        )
    parts, features = _take_apart(network, name, options, input_shape)
    model = TimmNetwork(network, parts, features, head, head_name, rates["drop_rate"], ignored)
    model.options = options
    return model


def _take_apart(
    network: nn.Module, name: str, options: dict[str, Any], input_shape: Sequence[int]
) -> tuple[list[Part], nn.Module]:
    """Return the parts of `network` for images of this shape, and its `FreezableNetwork.feature_map_layer`.

    Raises:
        ValueError: the network can't take this input shape.
    """
    with torch.device("meta"):
        twin = _create(name, 0, options)
    _check_shape(twin, input_shape, name)
    segments = divide(Features(network), Features(twin), input_shape)
    if len(segments) < 2:
        features = Features(network)
        return [Part(features, (network,)), Part(network.forward_head, ())], features
    owned = [_find(network, segment.owned) for segment in segments]
    owned[-1] += _outside(network, set(chain(*owned)))
    steps = [[segment.forward] for segment in segments]
    features = nn.Identity()
    if getattr(network, "global_pool", "") == "token" and len(steps) > 2:
        steps[-2].insert(0, features)  # of the last block's output, the head uses only the class token
    else:
        steps[-1].append(features)
    steps[-1].append(network.forward_head)
    forwards = [Chain(tuple(functions)) if len(functions) > 1 else functions[0] for functions in steps]
    return [Part(forward, tuple(pieces)) for forward, pieces in zip(forwards, owned, strict=True)], features


def _check_shape(network: nn.Module, input_shape: Sequence[int], name: str) -> None:
    """Raise a ValueError if `network`, on the meta device, can't take images of this size."""
    try:
        with torch.no_grad():
            network.eval().forward_head(network.forward_features(torch.zeros(1, 3, *input_shape, device="meta")))
    except (RuntimeError, AssertionError, ValueError) as error:
        raise ValueError(f"input_shape={tuple(input_shape)}: {name} can't take such images ({error})") from error


def _find(network: nn.Module, names: Iterable[str]) -> list[nn.Module | nn.Parameter]:
    """Return the modules and parameters of these names in `Features`; buffers are not included."""
    found = (attrgetter(name)(Features(network)) for name in names)
    return [piece for piece in found if isinstance(piece, nn.Module | nn.Parameter)]


def _outside(module: nn.Module, owned: set[nn.Module | nn.Parameter]) -> Iterator[nn.Module | nn.Parameter]:
    """Yield the largest modules and the parameters of `module` that don't overlap with those in `owned`."""
    if module in owned:
        return
    if owned.isdisjoint(module.modules()) and owned.isdisjoint(module.parameters()):
        yield module
        return
    yield from (parameter for parameter in module.parameters(recurse=False) if parameter not in owned)
    for child in module.children():
        yield from _outside(child, owned)


def _timm() -> ModuleType:
    try:
        import timm
    except ImportError as error:
        raise ValueError("backbone: timm/... needs timm; pip install timm") from error
    return timm


def _published(name: str) -> Any:
    """Return timm's `PretrainedCfg` of a network."""
    timm = _timm()
    if not timm.is_model(name):
        near = ", ".join(timm.list_models(f"*{name.split('.')[0]}*")[:3])
        raise ValueError(f"backbone='{TIMM}{name}': timm has no such network{f'; similar: {near}' if near else ''}")
    try:
        config = timm.get_pretrained_cfg(name)
    except RuntimeError as error:
        raise ValueError(f"backbone='{TIMM}{name}': {error}") from error
    if config is None:
        raise ValueError(f"backbone='{TIMM}{name}': a deprecated name; timm.create_model({name!r}) shows the new one")
    return config


def _create(name: str, num_classes: int, options: dict[str, Any]) -> nn.Module:
    return _timm().create_model(name, pretrained=False, num_classes=num_classes, **options)


def license_by_timm(name: str) -> str:
    """Return the license of a network's published weights as timm knows it; empty if it doesn't."""
    return _published(name.removeprefix(TIMM)).license or ""


def published_by_timm(name: str) -> tuple[str | None, dict[str, Any]]:
    """Return the Hugging Face repository of a network's weights, if any, and their preprocessing, as config fields."""
    config = _published(name.removeprefix(TIMM))
    repository = config.hf_hub_id
    if repository and repository.endswith("/"):
        repository += f"{config.architecture}.{config.tag}" if config.tag else config.architecture
    return repository, {
        "image_mean": tuple(config.mean),
        "image_std": tuple(config.std),
        "interpolation": "bilinear" if config.interpolation == "bilinear" else "bicubic",
        "eval_crop": float(config.crop_pct),
    }
