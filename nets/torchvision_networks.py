"""torchvision's networks behind the interface of `nets.network.FreezableNetwork`, by the table `TORCHVISION`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import chain as concatenate
from typing import Any

from torch import Tensor, nn

from nets.network import Part
from nets.wrapped import WrappedNetwork

Chain = list[list[nn.Module]]
"""A network taken apart: the modules of each part one after the other, from the stem to what gives (B, C)."""


class SwinNetwork(WrappedNetwork):
    """One whose map is (B, rows, columns, C)."""

    def to_map(self, x: Tensor) -> Tensor:
        """See `WrappedNetwork.to_map`."""
        return x.permute(0, 3, 1, 2)


def _resnet(network: nn.Module) -> Chain:
    stem = [network.conv1, network.bn1, network.relu, network.maxpool]
    blocks = concatenate(network.layer1, network.layer2, network.layer3, network.layer4)
    return [stem, *([block] for block in blocks), [network.avgpool, nn.Flatten()]]


def _vgg(network: nn.Module) -> Chain:
    """What lies between two poolings is a part."""
    stages: Chain = [[]]
    for module in network.features:
        stages[-1].append(module)
        if isinstance(module, nn.MaxPool2d):
            stages.append([])
    return [*stages[:-1], [network.avgpool, nn.Flatten(), *network.classifier]]


def _mobilenet(network: nn.Module) -> Chain:
    return [*([block] for block in network.features), [nn.AdaptiveAvgPool2d(1), nn.Flatten()]]


def _swin(network: nn.Module) -> Chain:
    """A merging of patches goes with the block after it."""
    stem, *rest = network.features
    blocks: Chain = [[]]
    for module in concatenate.from_iterable(m if isinstance(m, nn.Sequential) else [m] for m in rest):
        blocks[-1].append(module)
        if isinstance(module, type(rest[0][0])):
            blocks.append([])
    return [[stem], *blocks[:-1], [network.norm, network.permute, network.avgpool, network.flatten]]


@dataclass(frozen=True)
class Torchvision:
    """A network of torchvision.

    Attributes:
        name: of its function.
        weights: of its published weights.
        take_apart: the network without its head to its parts.
        head: the name of its last linear layer.
        rates: of `drop_rate` and `attn_drop_rate` those that it takes, and what it calls them; a `drop_rate` that it
            doesn't is put before the head.
        has_drop_path: whether it has stochastic depth.
        kind: what wraps it.
    """

    name: str
    weights: str
    take_apart: Callable[[nn.Module], Chain]
    head: str
    rates: Mapping[str, str] = field(default_factory=dict)
    has_drop_path: bool = False
    kind: type[WrappedNetwork] = WrappedNetwork


def _set_drop_path(network: nn.Module, rate: float) -> None:
    """Stochastic depth up to `rate` at the last block, rising from 0 at the first; torchvision's functions fix it."""
    from torchvision.ops import StochasticDepth

    places = [module for module in network.modules() if isinstance(module, StochasticDepth)]
    for number, place in enumerate(places):
        place.p = rate * number / max(1, len(places) - 1)


SWINS_RATES = {"drop_rate": "dropout", "attn_drop_rate": "attention_dropout"}

# By the names in bubbliiiing's classification-pytorch. The weights are the first that torchvision published: the second
# ones of the ResNets score higher on ImageNet itself, but the recipe behind them gives features that carry over less
# well when they are frozen (Kornblith et al., "Why Do Better Loss Functions Lead to Less Transferable Features?",
# 2021).
TORCHVISION: dict[str, Torchvision] = {
    "mobilenetv2": Torchvision("mobilenet_v2", "MobileNet_V2_Weights.IMAGENET1K_V1", _mobilenet, "classifier.1"),
    **{
        f"resnet{depth}": Torchvision(f"resnet{depth}", f"ResNet{depth}_Weights.IMAGENET1K_V1", _resnet, "fc")
        for depth in (18, 34, 50, 101, 152)
    },
    **{
        f"vgg{depth}{norm}": Torchvision(
            f"vgg{depth}{norm}",
            f"VGG{depth}{norm.upper()}_Weights.IMAGENET1K_V1",
            _vgg,
            "classifier.6",
            rates={"drop_rate": "dropout"},
        )
        for depth in (11, 13, 16)
        for norm in ("", "_bn")
    },
    **{
        f"swin_transformer_{size}": Torchvision(
            f"swin_{size[0]}",
            f"Swin_{size[0].upper()}_Weights.IMAGENET1K_V1",
            _swin,
            "head",
            SWINS_RATES,
            True,
            SwinNetwork,
        )
        for size in ("tiny", "small", "base")
    },
}


def build_torchvision(name: str, num_classes: int, **rates: float) -> WrappedNetwork:
    """The network that `TORCHVISION` calls `name`, with random weights."""
    import torchvision.models  # slow to import

    row = TORCHVISION[name]
    options = {theirs: rates[ours] for ours, theirs in row.rates.items()}
    network = torchvision.models.get_model(row.name, weights=None, num_classes=num_classes, **options)
    head = network.get_submodule(row.head)
    network.set_submodule(row.head, nn.Identity())
    if row.has_drop_path:
        _set_drop_path(network, rates["drop_path_rate"])
    places = {"drop_rate": True, "attn_drop_rate": "attn_drop_rate" in row.rates, "drop_path_rate": row.has_drop_path}
    ignored = tuple(rate for rate, place in places.items() if not place)
    drop_rate = 0.0 if "drop_rate" in row.rates else rates["drop_rate"]
    chain = row.take_apart(network)
    parts = [Part(nn.Sequential(*modules), tuple(modules)) for modules in chain]
    return row.kind(network, parts, chain[-2][-1], head, row.head, drop_rate, ignored)


def published_by_torchvision(name: str) -> tuple[str, dict[str, Any]]:
    """Where the published weights of a network in `TORCHVISION` are, and what they expect of images, by the names of
    the config's fields."""
    import torchvision.models  # slow to import

    weights = torchvision.models.get_weight(TORCHVISION[name].weights)
    transform = weights.transforms()
    return weights.url, {
        "image_mean": tuple(transform.mean),
        "image_std": tuple(transform.std),
        "interpolation": transform.interpolation.value,
        "eval_crop": transform.crop_size[0] / transform.resize_size[0],
    }
