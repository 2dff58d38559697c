"""Names to networks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from nets.network import FreezableNetwork
from nets.timm_networks import TIMM, build_timm, published_by_timm
from nets.torchvision_networks import TORCHVISION, build_torchvision, published_by_torchvision
from nets.vit import SIZES
from nets.vit import vit as build_vit
from nets.wrapped import RATES

BACKBONES: tuple[str, ...] = (*SIZES, *TORCHVISION)
"""Besides these, `timm/<name>` for any network of timm."""


def build_model(name: str, num_classes: int, input_shape: Sequence[int], **options: Any) -> FreezableNetwork:
    """Build the network `name`, with random weights.

    Args:
        name: a name in `BACKBONES`, or `timm/` and the name of a network of timm.
        num_classes: outputs of the head.
        input_shape: height and width of the images in pixels.
        options: `drop_rate`, `attn_drop_rate` and `drop_path_rate`, 0.1 each unless told; for a ViT `activation`,
            `norm_eps` and `num_registers` besides, see `nets.vit.vit`.

    Returns:
        A module from images (B, 3, height, width) to logits (B, num_classes), see `nets.network.FreezableNetwork`.

    Raises:
        ValueError: the name isn't known, or the network has no such option, or can't take that input shape.
    """
    if name in SIZES:
        return build_vit(input_shape, False, num_classes, name=name, **options)
    if name not in TORCHVISION and not name.startswith(TIMM):
        raise ValueError(f"backbone={name!r} is not known: choose one of {', '.join(BACKBONES)}, or {TIMM}<name>")
    if others := options.keys() - set(RATES):
        raise ValueError(f"backbone={name!r} takes no {', '.join(sorted(others))}: that is for the ViTs, vit_...")
    rates = dict.fromkeys(RATES, 0.1) | options
    if name in TORCHVISION:
        model = build_torchvision(name, num_classes, **rates)
    else:
        model = build_timm(name.removeprefix(TIMM), num_classes, input_shape, **rates)
    model.arguments = {"name": name, "num_classes": num_classes, "input_shape": list(input_shape)}
    return model


def build_meta_model(name: str, num_classes: int, input_shape: Sequence[int], **options: Any) -> FreezableNetwork:
    """The network `name` without its weights, on the meta device, where nothing is computed; see `build_model`.

    Raises:
        ValueError: as there, and if images of this size don't go through.
    """
    with torch.device("meta"):
        model = build_model(name, num_classes, input_shape, **options).eval()
        try:
            model(torch.zeros(1, 3, *input_shape))
        except RuntimeError as error:
            raise ValueError(f"input_shape={tuple(input_shape)}: {name} can't take such images ({error})") from error
    return model


def restore_model(arguments: Mapping[str, Any], weights: Mapping[str, Tensor]) -> FreezableNetwork:
    """The network that `arguments`, of `FreezableNetwork.arguments`, describe, with these weights.

    Raises:
        ValueError, TypeError: it can't be built from them.
        RuntimeError: the weights are of another.
    """
    if "head.bias" in weights and len(weights["head.bias"]) != arguments.get("num_classes"):
        raise RuntimeError("its head is for another number of classes than it says")
    # No time is spent on weights that are replaced at once, and no memory on what the file only claims to have.
    with torch.device("meta"):
        model = build_model(**arguments)
    model.load_state_dict(weights, assign=True)
    if any(buffer.is_meta for buffer in model.buffers()):  # some networks have tensors that aren't saved
        model = build_model(**arguments)
        model.load_state_dict(weights)
    return model


def expected_preprocessing(name: str) -> dict[str, Any]:
    """What the published weights of the network `name` expect of images, by the names of the config's fields, where
    it is torchvision or timm that tells; of a ViT its weights do, see `nets.weights.load.Weights`."""
    if name in TORCHVISION:
        return published_by_torchvision(name)[1]
    if name.startswith(TIMM):
        return published_by_timm(name)[1]
    return {}
