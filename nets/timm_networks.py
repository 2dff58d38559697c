"""Any network of timm as a `FreezableNetwork`."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from nets.network import Part
from nets.wrapped import NETWORK_PREFIX, WrappedNetwork

TIMM = "timm/"
"""Prefix of backbone names that select a network of timm."""


class TimmNetwork(WrappedNetwork):
    """A network of timm: convolutional, or a transformer with tokens."""

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

    def to_feature_map(self, x: Tensor) -> Tensor:
        if x.ndim == 3:  # tokens (B, N, C)
            x = x[:, getattr(self.network, "num_prefix_tokens", 0) :].transpose(1, 2)
            side = math.isqrt(x.shape[2])
            grid = getattr(getattr(self.network, "patch_embed", None), "grid_size", (side, side))
            return x.unflatten(2, grid if math.prod(grid) == x.shape[2] else (1, -1))
        return x.permute(0, 3, 1, 2) if getattr(self.network, "output_fmt", "") == "NHWC" else x

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


def build_timm(name: str, num_classes: int, input_shape: Sequence[int], **rates: float) -> TimmNetwork:
    """Build a network of timm with random weights; `name` comes without "timm/".

    If an image passes through a chain of modules, each module is a part. Otherwise, as in transformers with position
    embeddings, everything up to the pooling is one part.

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
    with torch.device("meta"):
        twin = _create(name, 0, options)
    names = find_chain(twin, input_shape, name)
    modules = [network.get_submodule(name) for name in names]
    features = modules[-1] if modules else Features(network)
    parts = [Part(module, (module,)) for module in modules] or [Part(features, (network,))]
    rest = tuple(_outside(network, set(modules))) if modules else ()
    parts.append(Part(network.forward_head, rest))
    return TimmNetwork(network, parts, features, head, head_name, rates["drop_rate"], ignored)


def find_chain(network: nn.Module, input_shape: Sequence[int], name: str) -> list[str]:
    """Return the names of modules that an image passes one after another, from the input to the last feature map.

    The chain is found by tracing a forward pass: the next module is the one that takes the previous module's output
    tensor. Modules inside a block are not listed. If the forward pass is not such a chain, the list is empty.

    Raises:
        ValueError: the network can't take images of this size.
    """
    calls: list[tuple[str, Tensor, Tensor]] = []

    def record(module_name: str, module: nn.Module, inputs: tuple, output: Any) -> None:
        single = len(inputs) == 1 and isinstance(inputs[0], Tensor) and isinstance(output, Tensor)
        if single and not isinstance(module, nn.Sequential):
            calls.append((module_name, inputs[0], output))

    for module_name, module in network.eval().named_modules():
        if module_name:
            module.register_forward_hook(lambda *call, name=module_name: record(name, *call))
    image = torch.zeros(1, 3, *input_shape, device="meta")
    try:
        with torch.no_grad():
            features = network.forward_features(image)
            feature_calls = calls.copy()
            network.forward_head(features)
    except (RuntimeError, AssertionError, ValueError) as error:
        raise ValueError(f"input_shape={tuple(input_shape)}: {name} can't take such images ({error})") from error
    chain, reached, start = [], image, 0
    # Calls are recorded when they end, so a block comes after the modules in it.
    while following := [i for i in range(start, len(feature_calls)) if feature_calls[i][1] is reached]:
        # Take the next call or a module around it; a later call has the same input tensor if it is modified in place.
        first = feature_calls[following[0]][0]
        around = [i for i in following if f"{first}.".startswith(f"{feature_calls[i][0]}.")]
        outermost = min(around, key=lambda i: feature_calls[i][0].count("."))
        module_name, _, reached = feature_calls[outermost]
        chain.append(module_name)
        start = outermost + 1
    return chain if reached is features else []


def _outside(module: nn.Module, chain: set[nn.Module]) -> Iterator[nn.Module | nn.Parameter]:
    """Yield the largest modules and the parameters of `module` that don't overlap with those in `chain`."""
    if module in chain:
        return
    if chain.isdisjoint(module.modules()):
        yield module
        return
    yield from module.parameters(recurse=False)
    for child in module.children():
        yield from _outside(child, chain)


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
