"""Everything that is decided before a run starts, each thing once: data, device, recipe, network, stages, precision."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from nets.network import FreezableNetwork
from utils.config.recipe import Choice, Known, choose
from utils.config.train_config import TrainConfig
from utils.modeling.build import build_meta_network, check_network
from utils.modeling.precision import choose_precision, pick_device
from utils.runs.resume import earlier_choices
from utils.training.datasets import Data, load_data
from utils.training.stages import Stage, plan_stages
from utils.training.summary import warn_about_input_shape


@dataclass(frozen=True)
class Setup:
    """What a run is going to be.

    Attributes:
        asked: the settings as a person wrote them.
        config: the settings with a value in every field.
        choices: what the recipe chose, also for fields whose own value is obeyed.
        data: the lists.
        network: on the meta device, without weights.
        stages: in order.
        device: where to train.
        precision: of matrix products: "fp32", "fp16" or "bf16".
        precision_reason: why.
    """

    asked: TrainConfig
    config: TrainConfig
    choices: list[Choice]
    data: Data
    network: FreezableNetwork
    stages: list[Stage]
    device: torch.device
    precision: str
    precision_reason: str


def prepare(asked: TrainConfig) -> Setup:
    """Decide what a run is going to be; nothing is computed or written, except lists where there are none.

    Raises:
        FileNotFoundError, ValueError: something that the settings name isn't there or can't work.
    """
    device = pick_device(asked.device)
    network = build_meta_network(asked, num_classes=2)
    if asked.recipe == "none":
        config = asked.with_defaults()
        check_network(network, config)  # before lists are written
    data = load_data(asked)
    network.head = nn.Linear(network.head.in_features, len(data.class_names), device="meta")
    choices = []
    if asked.recipe == "auto":
        choices = _choose(asked, data, network, device)
        unset = {choice.field: choice.value for choice in choices if getattr(asked, choice.field) is None}
        config = asked.with_defaults(**unset)
        check_network(network, config)
    warn_about_input_shape(data.train_images, config.input_shape, config.max_pixels)
    stages = plan_stages(config, len(data.train_images), network.transformer)
    return Setup(asked, config, choices, data, network, stages, device, *choose_precision(config.precision, device))


def _choose(asked: TrainConfig, data: Data, network: FreezableNetwork, device: torch.device) -> list[Choice]:
    """What the recipe chooses; for a run that is resumed, what it chose when the run started."""
    if (earlier := earlier_choices(asked, data.class_names)) is not None:
        return [Choice(field, value, "as chosen when the run started") for field, value in earlier.items()]
    head = sum(parameter.numel() for parameter in network.head.parameters())
    known = Known(
        class_counts=np.bincount(data.train_images.class_ids),
        pretrained=bool(asked.pretrained or asked.model_path),
        transformer=network.transformer,
        layers=count_layers(network),
        parameters=sum(parameter.numel() for parameter in network.parameters()) - head,
        on_cpu=device.type == "cpu",
    )
    return choose(asked, known)


def count_layers(network: FreezableNetwork) -> int:
    """The number of layers of a backbone that can have learning rates of their own."""
    return len({layer for name, layer in network.layers().items() if not name.startswith("head.")})
