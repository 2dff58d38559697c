"""Normalization followed by a network: uint8 pixels in, logits out."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from nets.network import FreezableNetwork
from utils.data.preprocessing import Preprocessing
from utils.modeling.precision import DTYPES, tune_kernels


class Normalize(nn.Module):
    """uint8 pixels (B, 3, height, width) to floats: divided by 255, minus `mean`, divided by `std`."""

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        scale = [1 / (255 * s) for s in std]
        shift = [-m / s for m, s in zip(mean, std, strict=True)]
        self.register_buffer("scale", torch.tensor(scale).view(3, 1, 1), persistent=False)
        self.register_buffer("shift", torch.tensor(shift).view(3, 1, 1), persistent=False)

    def forward(self, pixels: Tensor) -> Tensor:
        return torch.addcmul(self.shift, pixels.to(self.scale.dtype), self.scale)


class PixelNetwork(nn.Module):
    """Normalization followed by a network: uint8 pixels (B, 3, height, width) to logits (B, classes).

    Args:
        model: the network; it is moved to `device`, with channels last if it is convolutional.
        preprocessing: supplies the mean and the standard deviation.
        device: where it runs.
    """

    def __init__(self, model: FreezableNetwork, preprocessing: Preprocessing, device: torch.device) -> None:
        super().__init__()
        tune_kernels(device, model.convolutional)
        self.normalize = Normalize(preprocessing.image_mean, preprocessing.image_std)
        self.model = model
        self.to(device, memory_format=torch.channels_last if model.convolutional else torch.preserve_format)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.model(self.normalize(pixels))

    def forward_frozen(self, pixels: Tensor) -> Tensor:
        """The features that the frozen part computes: (B, N, C) in a transformer, (B, C, rows, columns) in a
        convolutional network, (B, C) with all but the head frozen."""
        return self.model.forward_frozen(self.normalize(pixels))


class ThawedPart(nn.Module):
    """The thawed part of a network: features, from `PixelNetwork.forward_frozen`, to logits (B, classes)."""

    def __init__(self, network: PixelNetwork) -> None:
        super().__init__()
        self.model = network.model

    def forward(self, features: Tensor) -> Tensor:
        return self.model.forward_thawed(features.float())


def cast_for_inference(network: nn.Module, precision: str) -> nn.Module:
    """Cast the weights of matrix products to `precision` and turn gradients off; returns `network`.

    Autocast gives the same outputs, but casts every weight for every batch.
    """
    network.requires_grad_(False)
    for module in network.modules():
        # Not subclasses: timm's standardize their weights, which validation does in fp32.
        if type(module) in (nn.Linear, nn.Conv2d):
            module.to(DTYPES[precision])
    return network
