"""Plans a run before it starts: data, device, settings, network, stages, precision."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import nn

from nets.network import FreezableNetwork
from utils.annotation.annotate import ensure_lists
from utils.config.recipe import Choice, Known, choose
from utils.config.train_config import TrainConfig
from utils.modeling.build import build_meta_network, check_network
from utils.modeling.precision import choose_precision, pick_device
from utils.runs.resume import earlier_choices
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
        choices: what the recipe chose, including fields that the user set differently.
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
    asked: TrainConfig,
    write_lists: bool = True,
    add_images: Callable[[TrainConfig, Data], Data] | None = None,
) -> Setup:
    """Plan a run. Nothing is written, except, with `write_lists`, missing lists. `add_images` adds to the lists that
    are read.

    Raises:
        FileNotFoundError, ValueError: a setting is invalid, or a file that it refers to is missing.
    """
    device = pick_device(asked.device)
    network = build_meta_network(asked, num_classes=2)
    if asked.recipe == "none":
        check_network(network, asked.with_defaults())  # before lists are written
    project = runtime.first(lambda: ensure_lists(asked, write=write_lists))
    placed = replace(asked, data=project).with_paths()
    data = load_data(placed)
    if add_images:
        data = add_images(placed, data)
    network.head = nn.Linear(network.head.in_features, len(data.class_names), device="meta")
    choices = runtime.first(lambda: _choose(asked, placed, data, network, device)) if asked.recipe == "auto" else []
    config = placed.with_defaults(**{c.field: c.value for c in choices if getattr(asked, c.field) is None})
    check_network(network, config)
    if project != asked.data:
        choices.append(Choice("data", project, "datasets/ has no images", by="demo"))
    warn_about_input_shape(data.train_images, config.input_shape, config.max_pixels)
    stages = plan_stages(config, len(data.train_images), network.transformer)
    check_single_images(stages, network)
    precision = runtime.first(lambda: choose_precision(config.precision, device))
    if must_shard(config, count_parameters(network), device):
        check_sharding(config, precision[0])
    return Setup(asked, config, choices, data, network, stages, device, *precision)


def _choose(
    asked: TrainConfig, placed: TrainConfig, data: Data, network: FreezableNetwork, device: torch.device
) -> list[Choice]:
    """The choices of the recipe; for a resumed run, those from its start."""
    if (earlier := earlier_choices(asked, data.class_names)) is not None:
        return [Choice(field, value, "as chosen when the run started") for field, value in earlier.items()]
    known = Known(
        class_counts=np.bincount(data.train_images.class_ids),
        pretrained=bool(asked.pretrained or asked.model_path),
        transformer=network.transformer,
        layers=count_layers(network),
        parameters=count_parameters(network) - count_parameters(network.head),
        on_cpu=device.type == "cpu",
        ranks=runtime.world_size,
        tested=Path(placed.test_annotation_path).is_file(),
    )
    return choose(asked, known)


def count_layers(network: FreezableNetwork) -> int:
    """The number of layers of a backbone that can have separate learning rates."""
    return len({layer for name, layer in network.layers().items() if not name.startswith("head.")})
