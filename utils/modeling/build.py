"""Builds the network of a run: first on the meta device to check the settings, then with its weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from nets.factory import build_meta_model, build_model, check_types, expected_preprocessing
from nets.network import FreezableNetwork
from nets.vit import SIZES
from nets.weights.load import Weights, load_weights, read_weights
from nets.weights.pretrained import find_pretrained
from nets.wrapped import DROP_RATES
from utils.config.frozen import Frozen
from utils.config.recipe import Choice
from utils.config.train_config import TrainConfig
from utils.data.preprocessing import resolve_preprocessing
from utils.system.seeds import derive_seed


def build_meta_network(config: TrainConfig, num_classes: int) -> FreezableNetwork:
    """The network on the meta device, where nothing is computed.

    Raises:
        ValueError: it can't be built, or can't take images of this shape.
    """
    return build_meta_model(config.backbone, num_classes, config.input_shape, **_activation(config))


def check_network(network: FreezableNetwork, config: TrainConfig) -> None:
    """Raise a ValueError if `network`, from `build_meta_network`, can't be trained with `config`."""
    if config.optimizer_type == "muon" and not network.transformer:
        raise ValueError(f"optimizer_type='muon': {config.backbone} isn't a transformer; choose another optimizer")
    for stage in config.all_stages:
        if stage.input_shape != config.input_shape:
            small = build_meta_model(config.backbone, 2, stage.input_shape, **_activation(config))
            small.resize(config.input_shape)
        Frozen(stage.frozen).apply(network)
    network.unfreeze_backbone()


def _activation(config: TrainConfig) -> dict[str, str]:
    return {} if config.activation == "auto" else {"activation": config.activation}


class BuiltNetwork(NamedTuple):
    """A network with its weights.

    Attributes:
        config: the settings, with the preprocessing that the weights expect.
        model: the network.
        origin: source of the weights, see `nets.weights.load.Weights.origin`.
        choices: settings that the weights or the network decide, with reasons.
    """

    config: TrainConfig
    model: FreezableNetwork
    origin: Mapping[str, str]
    choices: list[Choice]


def build_network(config: TrainConfig, class_names: list[str], resumed: dict[str, Any] | None = None) -> BuiltNetwork:
    """Build the network with its initial weights, pretrained or random, or with those of the checkpoint `resumed`."""
    weights = None if resumed else find_weights(config)
    expected = expected_preprocessing(config.backbone) | dict(weights.preprocessing) if weights else {}
    resolved = resolve_preprocessing(config, resumed["preprocessing"] if resumed else expected)
    changed = [name for name in expected if getattr(resolved, name) != getattr(config, name)]
    choices = [Choice(name, getattr(resolved, name), "expected by them", by="weights") for name in changed]
    arguments = {
        "name": config.backbone,
        "num_classes": len(class_names),
        "input_shape": config.all_stages[0].input_shape,
        **(weights.variant if weights else {}),
        **_activation(config),
    }
    rates = {rate: getattr(config, rate) for rate in DROP_RATES}
    parts = ["weights"]
    if weights and set(weights.class_names) & set(class_names):
        # Of a seed alone, a new head has the initial numbers of the old one, to which the features were trained: with
        # classes in another order it would start worse than chance.
        parts.append(weights.origin["sha256"])
    torch.manual_seed(derive_seed(config.seed, *parts))
    model = build_model(**(resumed["model"] if resumed else arguments), **rates)
    choices += [Choice(rate, 0.0, "it has no such layers", by="network") for rate in model.ignored_rates if rates[rate]]
    if resumed:
        try:
            weights = resumed["weights_in_training"] or resumed["weights"]
            check_types(model, weights)
            model.load_state_dict(weights)
        except (RuntimeError, ValueError) as error:
            raise ValueError(f"the checkpoint's weights don't fit its network: {error}; start a new run") from error
        return BuiltNetwork(resolved, model, resumed["origin"], choices)
    if weights:
        load_weights(model, weights, class_names)
    return BuiltNetwork(resolved, model, weights.origin if weights else {}, choices)


def find_weights(config: TrainConfig) -> Weights | None:
    """Read the weights that a new run starts from; None: random ones."""
    is_vit = config.backbone in SIZES
    if config.model_path:
        return read_weights(config.model_path, is_vit)
    if config.pretrained:
        return read_weights(find_pretrained(config.backbone, config.pretrained), is_vit)
    if Frozen(config.all_stages[0].frozen):
        print("warning: freeze_train=True: freezes an untrained backbone; set pretrained, or freeze_train=False")
    return None


def at_current_size(config: TrainConfig, model: FreezableNetwork) -> TrainConfig:
    """`config` with the current input shape of `model`, which `stages` can change."""
    return dataclasses.replace(config, input_shape=tuple(model.arguments["input_shape"]))
