"""What is known before training, for the recipe to choose by."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch

from nets.factory import build_meta_model
from nets.network import FreezableNetwork
from utils.annotation.annotate import ensure_lists
from utils.config.recipe import Known, apply_recipe
from utils.config.train_config import TrainConfig
from utils.data.image_list import read_classes, read_list
from utils.runs.resume import earlier_choices


def resolve_recipe(config: TrainConfig, device: torch.device) -> TrainConfig:
    """`config` with what its recipe chooses: for a run that goes on what it chose then, whatever is known now."""
    ensure_lists(config)
    class_names = read_classes(config.classes_path)
    chosen = earlier_choices(config, class_names)
    if chosen is not None:
        print(f"recipe: as it was chosen when the run began: {', '.join(f'{k}={v}' for k, v in chosen.items())}")
        return dataclasses.replace(config, **chosen)
    images = read_list(config.train_annotation_path, len(class_names))
    network = build_meta_model(config.backbone, 2, config.input_shape)
    known = Known(
        class_counts=np.bincount(images.class_ids),
        pretrained=bool(config.pretrained or config.model_path),
        transformer=network.transformer,
        layers=count_layers(network),
        parameters=sum(parameter.numel() for parameter in network.parameters()),
        on_cpu=device.type == "cpu",
    )
    return apply_recipe(config, known)


def count_layers(network: FreezableNetwork) -> int:
    """The parts of a backbone that can learn at rates of their own: one if it is all one piece."""
    return len({layer for name, layer in network.layers().items() if not name.startswith("head.")})
