"""The networks, by name."""

from collections.abc import Sequence
from typing import Any

from torch import nn

from nets.vit import SIZES
from nets.vit import vit as build_vit  # under its own name it would hide the module nets.vit

BACKBONES: tuple[str, ...] = tuple(SIZES)
TRANSFORMERS: frozenset[str] = frozenset(SIZES)


def build_model(
    name: str, num_classes: int, input_shape: Sequence[int], *, pretrained: bool = False, **options: Any
) -> nn.Module:
    """Build the network `name`, one of `BACKBONES`.

    Args:
        name: a name in `BACKBONES`.
        num_classes: outputs of the head.
        input_shape: height and width of the pictures in pixels.
        pretrained: start from published weights.
        options: what the family takes besides; for a ViT `activation`, `drop_rate`, `attn_drop_rate` and
            `drop_path_rate`, see `nets.vit.vit`.

    Returns:
        A module from pictures (B, 3, height, width) to logits (B, num_classes), with `forward_features`,
        `forward_head`, `freeze_backbone` and `unfreeze_backbone`, and the two parts that these divide it into,
        `forward_frozen` and `forward_thawed`; `forward_embedding` gives what its linear layer `head` takes, and
        `map_layer` is the last module whose output has a place for each part of the picture. Its attribute `arguments`
        holds what this function needs to build it again.

    Raises:
        ValueError: the name isn't known, or the network can't take that input shape.
        FileNotFoundError: there are no pretrained weights at hand.
    """
    if name not in BACKBONES:
        raise ValueError(f"backbone={name!r} is not known: choose one of {', '.join(BACKBONES)}")
    return build_vit(input_shape, pretrained, num_classes, name=name, **options)
