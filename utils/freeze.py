"""The stages of a run: which part of the network is frozen, for how long, in which batches, at which rate."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from utils.config import TrainConfig
from utils.optim import learning_rate_at, scale_learning_rate


@dataclass(frozen=True)
class Stage:
    """The epochs from `start` to below `end`.

    Attributes:
        start: first epoch, counted from 0.
        end: the epoch after the last.
        frozen: how many blocks are frozen besides the embeddings, "all" (everything but the head), or "nothing".
        batch_size: pictures a step, no more than the training list has.
        init_lr: highest learning rate, scaled by the batch size.
        min_lr: lowest learning rate, scaled likewise.
        run_epochs: epochs of the whole run, over which the learning rate falls.
        decay: how it falls, see `utils.optim.learning_rate_at`.
    """

    start: int
    end: int
    frozen: int | str
    batch_size: int
    init_lr: float
    min_lr: float
    run_epochs: int
    decay: str

    def freeze(self, model: nn.Module) -> None:
        """Freeze this stage's part of `model` and thaw the rest."""
        if self.frozen == "nothing":
            model.unfreeze_backbone()
        else:
            model.freeze_backbone(self.frozen)

    def learning_rate(self, epoch: float) -> float:
        """The learning rate after `epoch` epochs of the run, fractions included."""
        return learning_rate_at(epoch, self.run_epochs, self.init_lr, self.min_lr, self.decay)


def plan_stages(config: TrainConfig, num_pictures: int, transformer: bool) -> list[Stage]:
    """The stages that `config` asks for; one without epochs is left out. What had to be changed to fit is printed.

    Args:
        config: the settings.
        num_pictures: length of the training list.
        transformer: whether the backbone is one, whose learning rate is scaled otherwise.
    """
    thaw = config.freeze_epoch if config.freeze_train else 0
    frozen = (0, thaw, config.freeze_blocks, "freeze_batch_size")
    thawed = (thaw, config.unfreeze_epoch, "nothing", "unfreeze_batch_size")
    stages = []
    for start, end, part, field in (frozen, thawed):
        if start == end:
            continue
        batch_size = min(getattr(config, field), num_pictures)
        if batch_size < getattr(config, field):
            print(f"{field}: {getattr(config, field)} -> {batch_size}, the training list has no more pictures")
        rates = scale_learning_rate(config, batch_size, transformer)
        stages.append(Stage(start, end, part, batch_size, *rates, config.unfreeze_epoch, config.lr_decay_type))
    return stages
