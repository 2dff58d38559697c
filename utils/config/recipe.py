"""`recipe="auto"`: chooses settings from what is known before training, each with a reason."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from utils.config.train_config import PLAIN_DEFAULTS, TrainConfig

UNBALANCED = 10
"""Ratio of the largest to the smallest class at which sampling becomes balanced."""
MIN_EPOCHS, MAX_EPOCHS, MAX_EPOCHS_CPU = 30, 300, 100
"""Limits for training from scratch."""
IMAGES_FROM_SCRATCH = 600_000
"""Target number of training samples from scratch, over all epochs, within these limits."""
SMALL_BATCH_UP_TO = 5_000
"""Training images below which batches are small, for more steps."""

MIN_SAMPLES = 1_600
"""Training samples of fine-tuning at least, over all epochs: with fewer, the network stays close to where it began."""

LAYER_DECAY, LAYERS = 0.7, 14
"""Layer decay of a network with so many layers; with more of them the first one has the same rate. Bao et al., "BEiT",
2022, also have a weaker decay for ViT-L than for ViT-B."""

DROP_PATH_RATES = ((15, 0.0), (50, 0.05), (200, 0.2), (450, 0.45))
"""Stochastic depth from scratch, by a transformer's size in million parameters; 0.6 for larger ones. The rates of
ViT-S, B, L and H are those of Touvron et al., "DeiT III: Revenge of the ViT", 2022."""

TWO_STAGE_FIELDS = ("freeze_train", "unfreeze_epoch", "unfreeze_batch_size")
"""Fields that a list of stages replaces."""


class Known(NamedTuple):
    """What is known before training.

    Attributes:
        class_counts: training images of each class.
        pretrained: whether the run starts from weights.
        transformer: whether the network is a transformer.
        layers: number of backbone layers with separate learning rates.
        parameters: number of parameters of the network.
        on_cpu: whether the device is a CPU.
        ranks: number of processes.
    """

    class_counts: np.ndarray
    pretrained: bool
    transformer: bool
    layers: int
    parameters: int
    on_cpu: bool
    ranks: int = 1


class Choice(NamedTuple):
    """A value chosen for a field, and why.

    Attributes:
        field: its name.
        value: what was chosen.
        reason: why.
        by: "recipe", "measurement", "weights", "demo" or "network"; the network overrides the user.
    """

    field: str
    value: Any
    reason: str
    by: str = "recipe"


def choose(config: TrainConfig, known: Known) -> list[Choice]:
    """The choices of the recipe, including fields that `config` sets; the config takes precedence."""
    by_start = _for_pretrained if known.pretrained else _from_scratch
    choices = [*_for_all(config, known), *by_start(config, known)]
    chosen = {choice.field: choice.value for choice in choices}
    if known.pretrained:
        choices += _more_samples(config, chosen, int(known.class_counts.sum()))
    if config.freeze_train and not config.stages:
        epochs = config.unfreeze_epoch or chosen["unfreeze_epoch"]
        choices.append(Choice("freeze_epoch", max(1, epochs // 5), f"a fifth of the {epochs} epochs"))
    init_lr = config.init_lr or chosen.get("init_lr", PLAIN_DEFAULTS["init_lr"])
    choices.append(Choice("min_lr", init_lr / 100, "a hundredth of init_lr"))
    return [choice for choice in choices if not (config.stages and choice.field in TWO_STAGE_FIELDS)]


def _for_all(config: TrainConfig, known: Known) -> list[Choice]:
    choices = [Choice("parts", known.ranks, "as many as processes")] if known.ranks > 1 else []
    counts = known.class_counts[known.class_counts > 0]
    largest, smallest = counts.max(), counts.min()
    if largest >= UNBALANCED * smallest and config.class_weights != "balanced":
        reason = f"the largest class has {largest} images, the smallest {smallest}"
        choices.append(Choice("sampler", "balanced", reason))
    return choices


def _for_pretrained(config: TrainConfig, known: Known) -> list[Choice]:
    """For fine-tuning: few steps, small changes."""
    small_batch = known.on_cpu or known.class_counts.sum() < SMALL_BATCH_UP_TO
    probed = config.head_init != "random"
    choices = [
        Choice("head_init", "probe", "logistic regression on the pretrained features is a good initial head"),
        Choice(
            "freeze_train", False, "the probe replaces a frozen stage" if probed else "all layers learn from the start"
        ),
        Choice("unfreeze_epoch", *((5, "epochs are slow on a CPU") if known.on_cpu else (15, "on a GPU"))),
        Choice(
            "unfreeze_batch_size",
            *((16, "more steps") if small_batch else (64, "enough images for larger batches")),
        ),
        Choice("train_crop", 0.3, "the run is too short for small crops"),
        Choice("label_smoothing", 0.1, "few images are learned by heart otherwise"),
        *_without_dropout("the weights were trained without it"),
        Choice("drop_path_rate", 0.0, "the weights were trained without it"),
    ]
    if known.on_cpu:
        choices.append(Choice("augmentation", "none", "the run is too short for augmentation to help"))
    if known.transformer and known.layers > 1:
        decay = round(LAYER_DECAY ** (LAYERS / max(LAYERS, known.layers)), 2)
        choices.append(Choice("layer_decay", decay, f"early ones of {known.layers} layers need little change"))
        slowed = config.layer_decay is None or config.layer_decay < 1
        if config.optimizer_type in (None, "adamw") and slowed:
            choices.append(Choice("init_lr", 4e-3, "layer_decay slows early layers, so late ones can learn faster"))
    return choices


def _more_samples(config: TrainConfig, chosen: Mapping[str, Any], images: int) -> list[Choice]:
    """Several passes over a short list in each epoch, so that the run has `MIN_SAMPLES`."""
    epochs = sum(stage.epochs for stage in config.stages) or config.unfreeze_epoch or chosen["unfreeze_epoch"]
    repeats = math.ceil(MIN_SAMPLES / (epochs * images))
    reason = f"{epochs * images} samples in {epochs} epochs would be few"
    return [Choice("epoch_repeats", repeats, reason)] if repeats > 1 else []


def _from_scratch(config: TrainConfig, known: Known) -> list[Choice]:
    """For training from scratch: many epochs, and regularization against overfitting."""
    count = int(known.class_counts.sum())
    upper = MAX_EPOCHS_CPU if known.on_cpu else MAX_EPOCHS
    epochs = int(np.clip(round(IMAGES_FROM_SCRATCH / count), MIN_EPOCHS, upper))
    small_batch = count < SMALL_BATCH_UP_TO
    choices = [
        Choice("freeze_train", False, "an untrained backbone needs training"),
        Choice("unfreeze_epoch", epochs, f"{count * epochs} samples in all, in {MIN_EPOCHS} to {upper} epochs"),
        Choice(
            "unfreeze_batch_size",
            *((32, "more steps") if small_batch else (128, "enough images for larger batches")),
        ),
        Choice("ema_decay", 0.999, "averaging about a thousand steps beats the last step"),
        Choice("label_smoothing", 0.1, "long runs become overconfident"),
        *_without_dropout("augmentation regularizes better"),
    ]
    millions = known.parameters / 1e6
    rate = next((rate for limit, rate in DROP_PATH_RATES if millions <= limit), 0.6) if known.transformer else 0.0
    choices.append(Choice("drop_path_rate", rate, f"for {millions:.1f} million parameters"))
    if known.transformer:
        choices.append(Choice("optimizer_type", "muon", "it learns more per image than adamw"))
        choices.append(Choice("clip_grad", 1.0, "the first steps are unstable"))
        if config.optimizer_type in (None, "muon"):
            choices.append(Choice("momentum", 0.95, "as Muon's author recommends"))
            choices.append(Choice("init_lr", 4e-3, "Muon takes larger steps"))
    return choices


def _without_dropout(reason: str) -> list[Choice]:
    return [Choice(rate, 0.0, reason) for rate in ("drop_rate", "attn_drop_rate")]
