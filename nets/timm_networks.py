"""timm's networks, any of them, behind the interface of `nets.network.FreezableNetwork`."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from nets.network import Part
from nets.wrapped import OWN, WrappedNetwork

TIMM = "timm/"
"""What the names of timm's networks begin with here."""


class TimmNetwork(WrappedNetwork):
    """A network of timm, whose map may be of tokens too."""

    def resize(self, input_shape: Sequence[int]) -> None:
        """See `FreezableNetwork.resize`.

        Raises:
            ValueError: it is built for one size, by positions, say, that only timm knows where to find.
        """
        fixed = _published(self.arguments["name"].removeprefix(TIMM)).fixed_input_size
        if fixed and list(input_shape) != self.arguments["input_shape"]:
            raise ValueError(
                f"stages: {self.arguments['name']} takes one input_shape for the whole run; leave it out of the stages"
            )
        super().resize(input_shape)

    def to_map(self, x: Tensor) -> Tensor:
        """See `WrappedNetwork.to_map`."""
        if x.ndim == 3:  # tokens (B, N, C)
            x = x[:, getattr(self.network, "num_prefix_tokens", 0) :].transpose(1, 2)
            side = math.isqrt(x.shape[2])
            grid = getattr(getattr(self.network, "patch_embed", None), "grid_size", (side, side))
            return x.unflatten(2, grid if math.prod(grid) == x.shape[2] else (1, -1))
        return x.permute(0, 3, 1, 2) if getattr(self.network, "output_fmt", "") == "NHWC" else x

    def rename_state(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """See `WrappedNetwork.adopt`. timm's own filter renames what older files call otherwise, and resamples what
        belongs to another input shape."""
        filtered = getattr(sys.modules[type(self.network).__module__], "checkpoint_filter_fn", None)
        ours = any(name.startswith(OWN) for name in state)
        return super().rename_state(filtered(state, self.network) if filtered and not ours else state)


class Features(nn.Module):
    """The way of a network from images to its map, as one module."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, 3, height, width) to what the network's pooling takes."""
        return self.network.forward_features(x)


def build_timm(name: str, num_classes: int, input_shape: Sequence[int], **rates: float) -> TimmNetwork:
    """The network that timm calls `name` without "timm/", with random weights.

    Its parts are the modules that an image goes through one after the other. Where there is more to it than that, as
    in transformers with positions, all up to the pooling is one part.

    Raises:
        ValueError: timm has no such network or isn't installed, its head isn't a linear layer, or it can't take this
            input shape.
    """
    # Without dropout of its own, which some have where no part is frozen; before the head there is ours.
    options = {"drop_rate": 0.0, "drop_path_rate": rates["drop_path_rate"]}
    if _published(name).fixed_input_size:
        options["img_size"] = tuple(input_shape)
    try:
        network, ignored = _create(name, num_classes, options), ("attn_drop_rate",)
    except TypeError:  # it has no stochastic depth
        options.pop("drop_path_rate", None)
        network, ignored = _create(name, num_classes, options), ("attn_drop_rate", "drop_path_rate")
    head, head_name = network.get_classifier(), network.pretrained_cfg["classifier"]
    if not isinstance(head, nn.Linear) or not isinstance(head_name, str):
        raise ValueError(f"backbone='{TIMM}{name}': its head is no linear layer, which Thaw needs; choose another")
    if head.bias is None:
        raise ValueError(f"backbone='{TIMM}{name}': its head has no bias, which Thaw needs; choose another")
    before = network.state_dict().keys()
    network.reset_classifier(0)
    if others := before - network.state_dict().keys() - {f"{head_name}.weight", f"{head_name}.bias"}:
        raise ValueError(
            f"backbone='{TIMM}{name}': its head is no linear layer alone, it has {min(others)}; choose another"
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
    """The modules through which an image goes one after the other, from the image to the map before pooling, as
    small as they can be without being parts of a block; none if there is more to the way than that.

    Found by watching a forward: the next one is that which takes the very tensor that the last one gave.

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
            on_the_way = calls.copy()
            network.forward_head(features)
    except (RuntimeError, AssertionError, ValueError) as error:
        raise ValueError(f"input_shape={tuple(input_shape)}: {name} can't take such images ({error})") from error
    found, reached, start = [], image, 0
    # Calls come in the order in which they end, so that a block's own comes after those of what is in it.
    while following := [i for i in range(start, len(on_the_way)) if on_the_way[i][1] is reached]:
        # The next call or what contains it; a later one may take the same tensor, if that is changed in place.
        first = on_the_way[following[0]][0]
        around = [i for i in following if f"{first}.".startswith(f"{on_the_way[i][0]}.")]
        outermost = min(around, key=lambda i: on_the_way[i][0].count("."))
        name_of_it, _, reached = on_the_way[outermost]
        found.append(name_of_it)
        start = outermost + 1
    return found if reached is features else []


def _outside(module: nn.Module, chain: set[nn.Module]) -> Iterator[nn.Module | nn.Parameter]:
    """The largest modules in `module`, and the parameters, that are in none of `chain` and contain none of it."""
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
        raise ValueError('backbone: networks called "timm/..." need timm: pip install timm') from error
    return timm


def _published(name: str) -> Any:
    """What timm knows of the weights that are published for a network."""
    timm = _timm()
    if not timm.is_model(name):
        near = ", ".join(timm.list_models(f"*{name.split('.')[0]}*")[:3])
        raise ValueError(f"backbone='{TIMM}{name}': timm has no such network{f'; it has {near}' if near else ''}")
    try:
        known = timm.get_pretrained_cfg(name)
    except RuntimeError as error:
        raise ValueError(f"backbone='{TIMM}{name}': {error}") from error
    if known is None:
        raise ValueError(
            f"backbone='{TIMM}{name}': an old name; timm.create_model({name!r}) tells what it is called now"
        )
    return known


def _create(name: str, num_classes: int, options: dict[str, Any]) -> nn.Module:
    return _timm().create_model(name, pretrained=False, num_classes=num_classes, **options)


def published_by_timm(name: str) -> tuple[str | None, dict[str, Any]]:
    """The repository on the hub that has the published weights of a network, None if there is none, and what they
    expect of images, by the names of the config's fields."""
    known = _published(name.removeprefix(TIMM))
    repository = known.hf_hub_id
    if repository and repository.endswith("/"):
        repository += f"{known.architecture}.{known.tag}" if known.tag else known.architecture
    return repository, {
        "image_mean": tuple(known.mean),
        "image_std": tuple(known.std),
        "interpolation": "bilinear" if known.interpolation == "bilinear" else "bicubic",
        "eval_crop": float(known.crop_pct),
    }
