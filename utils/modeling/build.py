"""The network that a run trains: drawn without its weights, built with those that it begins with or goes on from."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from nets.factory import build_meta_model, build_model, expected_preprocessing
from nets.network import FreezableNetwork
from nets.vit import SIZES
from nets.weights.load import Weights, load_weights, read_weights
from nets.weights.pretrained import find_pretrained
from nets.wrapped import RATES
from utils.config.train_config import TrainConfig
from utils.data.preprocessing import resolve_preprocessing
from utils.system.seeds import derive_seed


def build_meta_network(config: TrainConfig, num_classes: int) -> FreezableNetwork:
    """The network without its weights, on the meta device: nothing is computed, but what can't be built or frozen
    like that is a ValueError."""
    options = {} if config.activation == "auto" else {"activation": config.activation}
    model = build_meta_model(config.backbone, num_classes, config.input_shape, **options)
    if config.optimizer_type == "muon" and not model.transformer:
        raise ValueError(
            f"optimizer_type='muon': that is for transformers, and {config.backbone} is none; give another"
        )
    for stage in config.all_stages:
        if stage.input_shape != config.input_shape:
            build_meta_model(config.backbone, num_classes, stage.input_shape, **options).resize(config.input_shape)
        if stage.frozen != "nothing":
            model.freeze_backbone(stage.frozen)
    return model


class BuiltNetwork(NamedTuple):
    """What a run begins with, or goes on with: the settings, with what they left open of the preprocessing; the
    network; and where its weights were from, see `nets.weights.load.Weights.origin`."""

    config: TrainConfig
    model: FreezableNetwork
    origin: Mapping[str, str]


def build_network(config: TrainConfig, class_names: list[str], resumed: dict[str, Any] | None = None) -> BuiltNetwork:
    """The network with the weights that the run starts from, random ones if there are none, or with those of the
    checkpoint that it goes on from; and what follows from them."""
    weights = None if resumed else find_weights(config)
    expected = expected_preprocessing(config.backbone) | dict(weights.preprocessing) if weights else {}
    resolved = resolve_preprocessing(config, resumed["preprocessing"] if resumed else expected)
    for name in expected:
        if getattr(resolved, name) != getattr(config, name):
            print(f"{name}: {getattr(resolved, name)}, as the weights expect")
    input_shape = config.all_stages[0].input_shape
    arguments = {"name": config.backbone, "num_classes": len(class_names), "input_shape": input_shape}
    arguments |= weights.variant if weights else {}
    arguments |= {} if config.activation == "auto" else {"activation": config.activation}
    rates = {rate: getattr(config, rate) for rate in RATES}
    torch.manual_seed(derive_seed(config.seed, "weights"))
    model = build_model(**(resumed["model"] if resumed else arguments), **rates)
    for rate in model.ignored_rates:
        if rates[rate]:
            print(f"{rate}: {rates[rate]} -> 0, {config.backbone} has no place for it")
    if resumed:
        model.load_state_dict(resumed["weights_in_training"] or resumed["weights"])
        return BuiltNetwork(resolved, model, resumed["origin"])
    if weights:
        load_weights(model, weights, class_names)
        return BuiltNetwork(resolved, model, weights.origin)
    return BuiltNetwork(resolved, model, {})


def find_weights(config: TrainConfig) -> Weights | None:
    """The weights that a new run starts from; None: random ones."""
    of_vit = config.backbone in SIZES
    if config.model_path:
        if config.pretrained:
            print(f"pretrained: {config.pretrained} -> False, for model_path says which weights to start from")
        return read_weights(config.model_path, of_vit)
    if config.pretrained:
        return read_weights(find_pretrained(config.backbone, config.pretrained), of_vit)
    if config.all_stages[0].frozen != "nothing":
        print("warning: freeze_train without pretrained weights freezes a backbone that has learned nothing yet")
    return None


def of_size(config: TrainConfig, model: FreezableNetwork) -> TrainConfig:
    """`config` with the input shape that `model` has now, which differs from stage to stage if `stages` says so."""
    return dataclasses.replace(config, input_shape=tuple(model.arguments["input_shape"]))
