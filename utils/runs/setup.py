"""Plans a run before it starts: data, device, settings, network, stages, precision."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import nn

from nets.network import FreezableNetwork
from utils.annotation.annotate import ensure_lists
from utils.config.recipe import Choice, Known, choose
from utils.config.train_config import AUTO, TrainConfig
from utils.modeling.build import build_meta_network, check_network
from utils.modeling.precision import choose_precision, pick_device
from utils.runs.resume import earlier_choices
from utils.runs.teacher import find_teacher
from utils.system.runtime import runtime
from utils.training.datasets import Data, load_data
from utils.training.sharding import check_sharding, must_shard
from utils.training.stages import Stage, check_single_images, plan_stages
from utils.training.summary import count_parameters, warn_about_input_shape


@dataclass(frozen=True)
class Setup:
    """The plan of a run.

    Attributes:
        asked: the settings as the user wrote them; unset fields are None.
        config: the settings with a value in every field.
        choices: what was measured or the recipe chose, including fields that the user set differently.
        network: on the meta device, without weights.
        precision: of matrix products: "fp32", "fp16" or "bf16".
        precision_reason: why it was chosen.
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


def prepare(
    asked: TrainConfig, write_lists: bool = True, add_images: Callable[[TrainConfig, Data], Data] | None = None
) -> Setup:
    """Plan a run. Nothing is written, except, with `write_lists`, missing lists, and downloads for `backbone="auto"`.
    `add_images` adds to the lists that are read.

    Raises:
        FileNotFoundError, ValueError: a setting is invalid, or a file that it refers to is missing.
    """
    device = pick_device(asked.device)
    if asked.distill_from:
        find_teacher(asked)  # before anything takes long
    network = None if asked.backbone == AUTO else build_meta_network(asked, num_classes=2)
    if network is not None and asked.recipe == "none":
        check_network(network, asked.with_defaults())  # before lists are written
    project = runtime.first(lambda: ensure_lists(asked, write=write_lists))
    placed = replace(asked, data=project).with_paths()
    data = load_data(placed)
    if add_images:
        data = add_images(placed, data)
    choices = runtime.first(lambda: _choose(placed, data, network, device, earlier_choices(asked, data.class_names)))
    if network is None:
        placed = replace(placed, backbone=next(choice.value for choice in choices if choice.field == "backbone"))
        network = build_meta_network(placed, num_classes=2)
    config, _, stages = _plan(placed, data, network, choices)
    if project != asked.data:
        choices.append(Choice("data", project, "datasets/ has no images", by="demo"))
    warn_about_input_shape(data.train_images, config.input_shape, config.max_pixels)
    precision = runtime.first(lambda: choose_precision(config.precision, device))
    if must_shard(config, count_parameters(network), device):
        check_sharding(config, precision[0])
    return Setup(asked, config, choices, data, network, stages, device, *precision)


def _choose(
    asked: TrainConfig,
    data: Data,
    network: FreezableNetwork | None,
    device: torch.device,
    earlier: Mapping[str, Any] | None,
) -> list[Choice]:
    """The choices of backbone and recipe where `asked` leaves them to the program; for a resumed run `earlier`, those
    from its start."""
    if earlier is not None:
        by = {"backbone": "measurement"}
        return [
            Choice(field, value, "as chosen when the run started", by.get(field, "recipe"))
            for field, value in earlier.items()
        ]
    if network is not None:
        return _by_recipe(asked, data, network, device)
    from utils.runs.backbone_search import choose_backbone  # imports scikit-learn

    def plan(name: str) -> tuple[TrainConfig, FreezableNetwork, list[Stage]]:
        named = replace(asked, backbone=name)
        network = build_meta_network(named, num_classes=2)
        return _plan(named, data, network, _by_recipe(named, data, network, device))

    choice = choose_backbone(asked, data, device, plan)
    named = replace(asked, backbone=choice.value)
    return [choice, *_by_recipe(named, data, build_meta_network(named, num_classes=2), device)]


def _by_recipe(asked: TrainConfig, data: Data, network: FreezableNetwork, device: torch.device) -> list[Choice]:
    """The choices of the recipe; none without it."""
    if asked.recipe == "none":
        return []
    known = Known(
        class_counts=np.bincount(data.train_images.class_ids),
        pretrained=bool(asked.pretrained or asked.model_path),
        transformer=network.transformer,
        layers=count_layers(network),
        parameters=count_parameters(network) - count_parameters(network.head),
        on_cpu=device.type == "cpu",
        ranks=runtime.world_size,
    )
    return choose(asked, known)


def _plan(
    asked: TrainConfig, data: Data, network: FreezableNetwork, choices: list[Choice]
) -> tuple[TrainConfig, FreezableNetwork, list[Stage]]:
    """The settings with `choices` in unset fields, the network with its head, and the stages.

    Raises:
        ValueError: the network can't be trained with them.
    """
    network.head = nn.Linear(network.head.in_features, len(data.class_names), device="meta")
    config = asked.with_defaults(**{c.field: c.value for c in choices if getattr(asked, c.field) is None})
    check_network(network, config)
    stages = plan_stages(config, len(data.train_images), network.transformer)
    check_single_images(stages, network)
    return config, network, stages


def count_layers(network: FreezableNetwork) -> int:
    """The number of layers of a backbone that can have separate learning rates."""
    return len({layer for name, layer in network.layers().items() if not name.startswith("head.")})
