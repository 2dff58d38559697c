"""A network behind its normalisation: uint8 pixels in, logits out."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from nets.network import FreezableNetwork
from utils.data.preprocessing import Preprocessing
from utils.modeling.precision import DTYPES, tune_kernels


class Normalise(nn.Module):
    """Pixels (B, 3, height, width) uint8 to floats, with `mean` subtracted and divided by `std` (of values 0 to 1)."""

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        scale = [1 / (255 * s) for s in std]
        shift = [-m / s for m, s in zip(mean, std, strict=True)]
        self.register_buffer("scale", torch.tensor(scale).view(3, 1, 1), persistent=False)
        self.register_buffer("shift", torch.tensor(shift).view(3, 1, 1), persistent=False)

    def forward(self, pixels: Tensor) -> Tensor:
        return torch.addcmul(self.shift, pixels.to(self.scale.dtype), self.scale)


def pixel_network(model: FreezableNetwork, preprocessing: Preprocessing, device: torch.device) -> nn.Module:
    """`model` behind the normalisation that it expects: uint8 pixels (B, 3, height, width) to logits. On `device`, in
    the order of memory and with the kernels that suit it there."""
    convolutional = model.convolutional
    tune_kernels(device, convolutional)
    normalise = Normalise(preprocessing.image_mean, preprocessing.image_std)
    memory_format = torch.channels_last if convolutional else torch.preserve_format
    return nn.Sequential(normalise, model).to(device, memory_format=memory_format)


def cast_products(network: nn.Module, precision: str) -> nn.Module:
    """`network` with the weights of its matrix products in `precision`, for inference only.

    Under autocast it gives what it gave before, without casting every weight at every batch. No weight has a gradient
    any more.
    """
    network.requires_grad_(False)
    for module in network.modules():
        # Not what is derived from these: timm's standardise their weight first, which validation does in fp32.
        if type(module) in (nn.Linear, nn.Conv2d):
            module.to(DTYPES[precision])
    return network
