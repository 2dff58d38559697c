"""Build networks by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nets.arguments import check_arguments
from nets.network import FreezableNetwork
from nets.timm_networks import TIMM, build_timm, published_by_timm
from nets.torchvision_networks import TORCHVISION, build_torchvision, published_by_torchvision
from nets.vit import SIZES
from nets.vit import vit as build_vit
from nets.wrapped import DROP_RATES

BACKBONES: tuple[str, ...] = (*SIZES, *TORCHVISION)
"""Names of the built-in backbones; `timm/<name>` selects any network of timm."""


def build_model(name: str, num_classes: int, input_shape: Sequence[int], **options: Any) -> FreezableNetwork:
    """Build the network `name` with random weights.

    Args:
        name: one of `BACKBONES`, or `timm/<name>`.
        num_classes: outputs of the head.
        input_shape: image height and width in pixels.
        options: `drop_rate`, `attn_drop_rate` and `drop_path_rate`, each 0.1 by default; for a ViT also `activation`,
            `norm_eps` and `num_registers`, see `nets.vit.vit`.

    Raises:
        ValueError: unknown name, unsupported option, or an input shape that the network can't take.
    """
    check_arguments({"name": name, "num_classes": num_classes, "input_shape": input_shape, **options})
    if name in SIZES:
        return build_vit(input_shape, False, num_classes, name=name, **options)
    if name not in TORCHVISION and not name.startswith(TIMM):
        raise ValueError(f"backbone={name!r}: unknown name; choose one of {', '.join(BACKBONES)}, or {TIMM}<name>")
    if unsupported := options.keys() - set(DROP_RATES):
        raise ValueError(f"backbone={name!r} has no {', '.join(sorted(unsupported))}: only vit_... backbones have it")
    rates = dict.fromkeys(DROP_RATES, 0.1) | options
    if name in TORCHVISION:
        model = build_torchvision(name, num_classes, **rates)
    else:
        model = build_timm(name.removeprefix(TIMM), num_classes, input_shape, **rates)
    model.arguments = {"name": name, "num_classes": num_classes, "input_shape": list(input_shape)}
    return model


def build_meta_model(name: str, num_classes: int, input_shape: Sequence[int], **options: Any) -> FreezableNetwork:
    """Build the network `name` on the meta device, which allocates no memory for its weights.

    Raises:
        ValueError: see `build_model`; or a forward pass at this input shape fails.
    """
    with torch.device("meta"):
        model = build_model(name, num_classes, input_shape, **options).eval()
        try:
            model(torch.zeros(1, 3, *input_shape))
        except RuntimeError as error:
            raise ValueError(f"input_shape={tuple(input_shape)}: {name} can't take such images ({error})") from error
    return model


def restore_model(arguments: Mapping[str, Any], weights: Mapping[str, Tensor]) -> FreezableNetwork:
    """Rebuild a network from its `FreezableNetwork.arguments` and weights.

    Raises:
        ValueError: the arguments are invalid, or a weight has another type than the network's.
        RuntimeError: the weights don't fit.
    """
    check_arguments(arguments)
    if "head.bias" in weights and len(weights["head.bias"]) != arguments.get("num_classes"):
        raise RuntimeError("the size of its head differs from num_classes")
    # On the meta device, no time is spent on initialization and no memory on tensors that the file doesn't contain.
    with torch.device("meta"):
        model = build_model(**arguments)
    check_types(model, weights)
    model.load_state_dict(weights, assign=True)
    if any(buffer.is_meta for buffer in model.buffers()):  # some networks have buffers that are not saved
        model = build_model(**arguments)
        model.load_state_dict(weights)
    return model


def check_types(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Raise a ValueError if one of `weights` has another type than in the network `model`."""
    for name, own in model.state_dict().items():
        if name in weights and weights[name].dtype != own.dtype:
            raise ValueError(f"its weight {name} is of type {weights[name].dtype}, not {own.dtype}")


def expected_preprocessing(name: str) -> dict[str, Any]:
    """Return the preprocessing of a network's published weights, as config fields; only torchvision and timm define it.

    For a ViT it depends on the file, see `nets.weights.load.Weights`.
    """
    if name in TORCHVISION:
        return published_by_torchvision(name)[1]
    if name.startswith(TIMM):
        return published_by_timm(name)[1]
    return {}
