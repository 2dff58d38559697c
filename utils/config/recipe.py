"""What `recipe="auto"` chooses: settings from what is known before training, each with its reason."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from typing import Any, NamedTuple

import numpy as np

from utils.config.train_config import FREE_FIELDS, TrainConfig

UNBALANCED = 10
"""So many times more images in the largest class than in the smallest are too many to go by all alike."""
MIN_EPOCHS, MAX_EPOCHS, MAX_EPOCHS_CPU = 30, 300, 100
"""From scratch."""
IMAGES_FROM_SCRATCH = 600_000
"""That a network from scratch sees, if that takes neither fewer nor more epochs than these."""
SMALL_BATCH_UP_TO = 5_000
"""Training images of which batches are small, so that there are enough steps."""

DEPTHS_DROPPED = ((15, 0.0), (50, 0.05), (200, 0.2), (450, 0.45))
"""Stochastic depth of a transformer from scratch, by up to how many million parameters it has; larger ones have 0.6.
The rates for ViT-S, B, L and H are those of Touvron et al., "DeiT III: Revenge of the ViT", 2022."""

TWO_STAGE_FIELDS = ("freeze_train", "unfreeze_epoch", "unfreeze_batch_size")
"""What a list of stages says instead."""


class Known(NamedTuple):
    """What is known before training.

    Attributes:
        class_counts: training images of each class.
        pretrained: whether the run starts from weights.
        transformer: whether the network is one.
        layers: of the backbone, see `count_layers`.
        parameters: of the network.
        on_cpu: whether it is trained there.
    """

    class_counts: np.ndarray
    pretrained: bool
    transformer: bool
    layers: int
    parameters: int
    on_cpu: bool


class Choice(NamedTuple):
    """A field, its value, and why."""

    field: str
    value: Any
    reason: str


def keep_flags(config: TrainConfig, flags: Collection[str]) -> TrainConfig:
    """`config` with `keep` naming the fields that were set to their default by a flag, too."""
    names = [field.name for field in dataclasses.fields(config) if field.name in flags and is_open(config, field.name)]
    return dataclasses.replace(config, keep=(*config.keep, *(name for name in names if name not in FREE_FIELDS)))


def apply_recipe(config: TrainConfig, known: Known) -> TrainConfig:
    """`config` with each choice, which is printed. A field that isn't at its default, or is to be kept, stays as it is,
    and what a list of `stages` says is left to it. `recipe` is then "none": nothing is left to choose."""
    chosen: dict[str, Any] = {"recipe": "none"}
    choose = for_pretrained if known.pretrained else from_scratch
    for field, value, reason in _with_freezing(config, [*for_all(known, config), *choose(known, config)]):
        if not is_open(config, field):
            if getattr(config, field) != value:
                print(f"recipe: {field} stays {getattr(config, field)}, as you set it ({value} was due: {reason})")
        elif not (field in TWO_STAGE_FIELDS and config.stages):
            print(f"recipe: {field}={value}: {reason}")
            chosen[field] = value
    if is_open(config, "min_lr"):
        chosen["min_lr"] = chosen.get("init_lr", config.init_lr) / 100
        print(f"recipe: min_lr={chosen['min_lr']:.2g}: a hundredth of init_lr")
    print(
        "recipe: a field of CONFIG at its default counts as not set; to have it so, give it as a flag or name it too: "
        'keep=("unfreeze_epoch",)'
    )
    return dataclasses.replace(config, **chosen)


def _with_freezing(config: TrainConfig, choices: list[Choice]) -> list[Choice]:
    """The choices, and how long the backbone is frozen where that was wanted."""
    if config.stages or not config.freeze_train or is_open(config, "freeze_train"):
        return choices
    chosen = {choice.field: choice.value for choice in choices}
    epochs = chosen["unfreeze_epoch"] if is_open(config, "unfreeze_epoch") else config.unfreeze_epoch
    return [*choices, Choice("freeze_epoch", max(1, epochs // 5), f"a fifth of the {epochs} epochs")]


def is_open(config: TrainConfig, field: str) -> bool:
    """Whether a field is left to the recipe."""
    return field not in config.keep and getattr(config, field) == getattr(TrainConfig, field)


def for_all(known: Known, config: TrainConfig) -> list[Choice]:
    """Whatever the run starts from."""
    counts = known.class_counts[known.class_counts > 0]
    largest, smallest = counts.max(), counts.min()
    if largest < UNBALANCED * smallest or config.class_weights == "balanced":
        return []
    return [Choice("sampler", "balanced", f"the largest class has {largest} images, the smallest {smallest}")]


def for_pretrained(known: Known, config: TrainConfig) -> list[Choice]:
    """Fine-tuning: what the weights know is to be kept, so the steps are few and careful."""
    count = known.class_counts.sum()
    few = known.on_cpu or count < SMALL_BATCH_UP_TO
    probed = is_open(config, "head_init") or config.head_init == "probe"
    unfrozen = "after that a frozen stage has nothing left to do" if probed else "all of it learns in all epochs"
    choices = [
        Choice("head_init", "probe", "the head begins as good as the pretrained backbone allows"),
        Choice("freeze_train", False, unfrozen),
        Choice("unfreeze_epoch", *((5, "on a processor each epoch is dear") if known.on_cpu else (15, "on a GPU"))),
        Choice("unfreeze_batch_size", *((16, "many small steps") if few else (64, "images enough"))),
        Choice("train_crop", 0.3, "a short run has no time for small crops"),
        *_without_dropout("the weights were made without"),
        Choice("drop_path_rate", 0.0, "likewise"),
    ]
    if known.on_cpu:
        choices.append(Choice("augmentation", "none", "a short run learns more from images as they are"))
    if known.transformer and known.layers > 1:
        choices.append(Choice("layer_decay", 0.7, "early layers are good already"))
        slowed = is_open(config, "layer_decay") or config.layer_decay < 1
        if config.optimizer_type == "adamw" and slowed:
            choices.append(Choice("init_lr", 4e-3, "with early layers slowed down the late ones can be fast"))
    return choices


def from_scratch(known: Known, config: TrainConfig) -> list[Choice]:
    """All is to be learned: many epochs, and what keeps a network from learning the images by heart."""
    count = int(known.class_counts.sum())
    most = MAX_EPOCHS_CPU if known.on_cpu else MAX_EPOCHS
    epochs = int(np.clip(round(IMAGES_FROM_SCRATCH / count), MIN_EPOCHS, most))
    small = count < SMALL_BATCH_UP_TO
    choices = [
        Choice("freeze_train", False, "nothing is gained by freezing what has learned nothing"),
        Choice(
            "unfreeze_epoch",
            epochs,
            f"{count * epochs} images are seen in all; {MIN_EPOCHS} to {most} epochs are usual",
        ),
        Choice("unfreeze_batch_size", *((32, "many small steps") if small else (128, "images enough"))),
        Choice("ema_decay", 0.999, "the average of the last thousand steps is better than the last"),
        Choice("label_smoothing", 0.1, "a long run grows too sure of itself"),
        *_without_dropout("augmentation does more against learning by heart"),
    ]
    millions = known.parameters / 1e6
    dropped = next((rate for most, rate in DEPTHS_DROPPED if millions <= most), 0.6) if known.transformer else 0.0
    choices.append(Choice("drop_path_rate", dropped, f"stochastic depth by size, {millions:.1f} million parameters"))
    if known.transformer:
        choices.append(Choice("optimizer_type", "muon", "it learns more from each image than adamw does"))
        choices.append(Choice("clip_grad", 1.0, "the first steps jump"))
        if config.optimizer_type == "muon" or is_open(config, "optimizer_type"):
            choices.append(Choice("momentum", 0.95, "as Muon's author has it"))
            choices.append(Choice("init_lr", 4e-3, "Muon takes larger steps well"))
    return choices


def _without_dropout(reason: str) -> list[Choice]:
    return [Choice(rate, 0.0, reason) for rate in ("drop_rate", "attn_drop_rate")]
