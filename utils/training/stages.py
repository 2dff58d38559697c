"""The stages of a run: epochs, frozen part, batch size, input shape, learning rate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from nets.network import FreezableNetwork
from utils.config.frozen import Frozen
from utils.config.train_config import TrainConfig
from utils.training.optimizer import learning_rate_at, scale_learning_rate


@dataclass(frozen=True)
class Stage:
    """The epochs from `start` up to, but not including, `end`.

    Attributes:
        start: first epoch, counted from 0.
        end: the epoch after the last.
        frozen: how much of the backbone is frozen.
        batch_size: images per step, at most the length of the training list.
        steps: per epoch.
        input_shape: height and width of the images, in pixels.
        init_lr: highest learning rate, scaled by the batch size.
        min_lr: lowest learning rate, scaled the same way.
        run_epochs: epochs of the whole run, over which the learning rate falls.
        decay: how it falls, see `utils.training.optimizer.learning_rate_at`.
        warmup: epochs over which it first rises from a tenth.
        notes: adjusted settings, with reasons.
    """

    start: int
    end: int
    frozen: Frozen
    batch_size: int
    steps: int
    input_shape: tuple[int, int]
    init_lr: float
    min_lr: float
    run_epochs: int
    decay: str
    warmup: float = 0.0
    notes: tuple[str, ...] = ()

    def learning_rate(self, epoch: float) -> float:
        """The learning rate after `epoch` (may be a fraction) epochs of the run."""
        rate = learning_rate_at(epoch, self.run_epochs, self.init_lr, self.min_lr, self.decay)
        done = epoch - self.start
        return rate * (0.1 + 0.9 * done / self.warmup) if done < self.warmup else rate


def plan_stages(config: TrainConfig, num_images: int, transformer: bool) -> list[Stage]:
    """The stages of a run with `num_images` training images; learning rates of a `transformer` scale differently."""
    stages: list[Stage] = []
    for planned in config.all_stages:
        batch_size = min(planned.batch_size, num_images)
        notes = []
        if batch_size < planned.batch_size:
            notes.append(f"batch size {planned.batch_size} -> {batch_size}: the training list has no more images")
        rates = {}
        for field in ("init_lr", "min_lr"):
            rates[field], note = scale_learning_rate(config, field, batch_size, transformer)
            notes += [note] if note else []
        start = stages[-1].end if stages else 0
        stages.append(
            Stage(
                start=start,
                end=start + planned.epochs,
                frozen=Frozen(planned.frozen),
                batch_size=batch_size,
                steps=config.epoch_repeats * num_images // batch_size,
                input_shape=planned.input_shape,
                **rates,
                run_epochs=config.epochs,
                decay=config.lr_decay_type,
                warmup=config.thaw_warmup if stages else 0.0,
                notes=tuple(notes),
            )
        )
    return stages


def check_single_images(stages: Sequence[Stage], network: FreezableNetwork) -> None:
    """Raise a ValueError if a stage has batches of one image, and batch norm can't compute their variance. `network` is
    on the meta device; freezing changes it."""
    if not any(isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d) for module in network.modules()):
        return
    for stage in stages:
        if stage.batch_size > 1:
            continue
        stage.frozen.apply(network)
        try:
            network.train()(torch.empty(1, 3, *stage.input_shape, device="meta"))
        except ValueError as error:
            raise ValueError(
                f"the batch norm of {network.arguments['name']} can't be trained with batches of one image of "
                f"{stage.input_shape[0]} x {stage.input_shape[1]} pixels ({error}); set the batch sizes to 2 or more, "
                f"a larger input_shape, or freeze_blocks to all"
            ) from error


def num_cached_views(stage: Stage, config: TrainConfig) -> int:
    """The number of cached views of each image that `stage` trains on; 0: it trains on images.

    A stage that sees each image no more often than there are views trains on images, since caching would save no
    computation, and so does one with a teacher, which needs the images.
    """
    visits = (stage.end - stage.start) * config.epoch_repeats
    cached = stage.frozen and config.cache_features and not config.distill_from and visits > config.feature_views
    return config.feature_views if cached else 0
