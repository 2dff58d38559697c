"""The stages of a run: which part of the network is frozen, for how long, in which batches, at which rate."""

from __future__ import annotations

from dataclasses import dataclass

from nets.network import FreezableNetwork
from utils.config.train_config import TrainConfig
from utils.training.optimizer import learning_rate_at, scale_learning_rate


@dataclass(frozen=True)
class Stage:
    """The epochs from `start` to below `end`.

    Attributes:
        start: first epoch, counted from 0.
        end: the epoch after the last.
        frozen: how many blocks are frozen besides the embeddings, "all" (everything but the head), or "nothing".
        batch_size: images a step, no more than the training list has.
        input_shape: height and width of the images, in pixels.
        init_lr: highest learning rate, scaled by the batch size.
        min_lr: lowest learning rate, scaled likewise.
        run_epochs: epochs of the whole run, over which the learning rate falls.
        decay: how it falls, see `utils.training.optimizer.learning_rate_at`.
        warmup: epochs over which it rises first, from a tenth of what it would be.
    """

    start: int
    end: int
    frozen: int | str
    batch_size: int
    input_shape: tuple[int, int]
    init_lr: float
    min_lr: float
    run_epochs: int
    decay: str
    warmup: float = 0.0

    def freeze(self, model: FreezableNetwork) -> None:
        """Freeze this stage's part of `model` and thaw the rest."""
        if self.frozen == "nothing":
            model.unfreeze_backbone()
        else:
            model.freeze_backbone(self.frozen)

    def learning_rate(self, epoch: float) -> float:
        """The learning rate after `epoch` epochs of the run, fractions included."""
        rate = learning_rate_at(epoch, self.run_epochs, self.init_lr, self.min_lr, self.decay)
        done = epoch - self.start
        return rate * (0.1 + 0.9 * done / self.warmup) if done < self.warmup else rate


def plan_stages(config: TrainConfig, num_images: int, transformer: bool) -> list[Stage]:
    """The stages that `config` asks for. What had to be changed to fit is printed.

    Args:
        config: the settings.
        num_images: length of the training list.
        transformer: whether the backbone is one, whose learning rate is scaled otherwise.
    """
    stages: list[Stage] = []
    for wanted in config.all_stages:
        batch_size = min(wanted.batch_size, num_images)
        if batch_size < wanted.batch_size:
            print(f"batch size: {wanted.batch_size} -> {batch_size}, the training list has only so many images")
        start = stages[-1].end if stages else 0
        stages.append(
            Stage(
                start=start,
                end=start + wanted.epochs,
                frozen=wanted.frozen,
                batch_size=batch_size,
                input_shape=wanted.input_shape,
                init_lr=scale_learning_rate(config, "init_lr", batch_size, transformer),
                min_lr=scale_learning_rate(config, "min_lr", batch_size, transformer),
                run_epochs=config.epochs,
                decay=config.lr_decay_type,
                warmup=config.thaw_warmup if stages else 0.0,
            )
        )
    return stages


def num_cached_views(stage: Stage, config: TrainConfig) -> int:
    """How many views of each image `stage` has the features of computed beforehand; 0: it trains on the images.

    A stage with no more epochs than views does, for it computes no more without.
    """
    if stage.frozen == "nothing" or not config.cache_features or stage.end - stage.start <= config.feature_views:
        return 0
    return config.feature_views
