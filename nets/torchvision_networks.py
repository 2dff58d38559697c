"""Networks of torchvision as `FreezableNetwork`s; the table `TORCHVISION` lists them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import chain as concatenate
from typing import Any

from torch import Tensor, nn

from nets.network import Part
from nets.wrapped import DROP_RATES, WrappedNetwork

Chain = list[list[nn.Module]]
"""The modules of each part, in forward order, from the stem to the pooling."""


class SwinNetwork(WrappedNetwork):
    """A Swin transformer, with feature maps (B, rows, columns, C)."""

    def to_feature_map(self, x: Tensor) -> Tensor:
        return x.permute(0, 3, 1, 2)


def _resnet(network: nn.Module) -> Chain:
    stem = [network.conv1, network.bn1, network.relu, network.maxpool]
    blocks = concatenate(network.layer1, network.layer2, network.layer3, network.layer4)
    return [stem, *([block] for block in blocks), [network.avgpool, nn.Flatten()]]


def _vgg(network: nn.Module) -> Chain:
    """Split at each max pooling."""
    stages: Chain = [[]]
    for module in network.features:
        stages[-1].append(module)
        if isinstance(module, nn.MaxPool2d):
            stages.append([])
    return [*stages[:-1], [network.avgpool, nn.Flatten(), *network.classifier]]


def _mobilenet(network: nn.Module) -> Chain:
    return [*([block] for block in network.features), [nn.AdaptiveAvgPool2d(1), nn.Flatten()]]


def _swin(network: nn.Module) -> Chain:
    """Make each block a part; patch merging belongs to the block after it."""
    stem, *rest = network.features
    blocks: Chain = [[]]
    for module in concatenate.from_iterable(m if isinstance(m, nn.Sequential) else [m] for m in rest):
        blocks[-1].append(module)
        if isinstance(module, type(rest[0][0])):
            blocks.append([])
    return [[stem], *blocks[:-1], [network.norm, network.permute, network.avgpool, network.flatten]]


@dataclass(frozen=True)
class Torchvision:
    """One row of `TORCHVISION`.

    Attributes:
        name: torchvision's name of the model builder.
        weights: name of the published weights.
        take_apart: splits the network, without its head, into parts.
        head: name of the last linear layer.
        rates: supported rates and torchvision's names for them; without a `drop_rate`, dropout is added before the
            head.
        has_drop_path: whether the network has stochastic depth.
        kind: the wrapper class.
    """

    name: str
    weights: str
    take_apart: Callable[[nn.Module], Chain]
    head: str
    rates: Mapping[str, str] = field(default_factory=dict)
    has_drop_path: bool = False
    kind: type[WrappedNetwork] = WrappedNetwork


def _set_drop_path(network: nn.Module, rate: float) -> None:
    """Set stochastic depth to rise linearly from 0 to `rate`; torchvision's model builders don't take a rate."""
    from torchvision.ops import StochasticDepth

    layers = [module for module in network.modules() if isinstance(module, StochasticDepth)]
    for i, layer in enumerate(layers):
        layer.p = rate * i / max(1, len(layers) - 1)


SWIN_RATES = {"drop_rate": "dropout", "attn_drop_rate": "attention_dropout"}

# Names as in bubbliiiing's classification-pytorch. All weights are IMAGENET1K_V1: the V2 weights of the ResNets are
# more accurate on ImageNet, but their frozen features transfer less well (Kornblith et al., "Why Do Better Loss
# Functions Lead to Less Transferable Features?", 2021).
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
            SWIN_RATES,
            True,
            SwinNetwork,
        )
        for size in ("tiny", "small", "base")
    },
}


def build_torchvision(name: str, num_classes: int, **rates: float) -> WrappedNetwork:
    """Build a network of `TORCHVISION` with random weights."""
    import torchvision.models  # slow to import

    row = TORCHVISION[name]
    options = {theirs: rates[ours] for ours, theirs in row.rates.items()}
    network = torchvision.models.get_model(row.name, weights=None, num_classes=num_classes, **options)
    head = network.get_submodule(row.head)
    network.set_submodule(row.head, nn.Identity())
    if row.has_drop_path:
        _set_drop_path(network, rates["drop_path_rate"])
    supported = {"drop_rate", *row.rates} | ({"drop_path_rate"} if row.has_drop_path else set())
    ignored = tuple(rate for rate in DROP_RATES if rate not in supported)
    drop_rate = 0.0 if "drop_rate" in row.rates else rates["drop_rate"]
    chain = row.take_apart(network)
    parts = [Part(nn.Sequential(*modules), tuple(modules)) for modules in chain]
    return row.kind(network, parts, chain[-2][-1], head, row.head, drop_rate, ignored)


def published_by_torchvision(name: str) -> tuple[str, dict[str, Any]]:
    """Return the URL of a network's published weights and their preprocessing, as config fields."""
    import torchvision.models  # slow to import

    weights = torchvision.models.get_weight(TORCHVISION[name].weights)
    transform = weights.transforms()
    return weights.url, {
        "image_mean": tuple(transform.mean),
        "image_std": tuple(transform.std),
        "interpolation": transform.interpolation.value,
        "eval_crop": transform.crop_size[0] / transform.resize_size[0],
    }
