"""When the checkpoints of a run are written, and the disk space for them."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from torch import nn

from utils.config.train_config import TrainConfig
from utils.runs.checkpoint import SUFFIX, count_bytes, save_checkpoint
from utils.system.files import format_bytes, free_bytes

MOMENTS = {"sgd": 1, "adam": 2, "adamw": 2, "muon": 2}
"""The maximum number of tensors that an optimizer stores per parameter."""


class Saver:
    """Writes the checkpoints of a run; `step` is that of the checkpoint it is resumed from, -1 if there is none."""

    def __init__(self, folder: Path, config: TrainConfig, step: int = -1) -> None:
        self.folder = folder
        self.config = config
        self.saved_step = step
        self.saved_at = time.monotonic()

    def is_due(self, step: int) -> bool:
        """Whether a checkpoint is due after this step, by `save_every_steps`."""
        steps = self.config.save_every_steps
        return steps > 0 and step % steps == 0

    def is_late(self) -> bool:
        """Whether a checkpoint is due, by `save_every_minutes`."""
        minutes = self.config.save_every_minutes
        return minutes > 0 and time.monotonic() - self.saved_at >= 60 * minutes

    def write(self, content: dict[str, Any], *names: str) -> None:
        """Write a checkpoint under each of these names, see `save_checkpoint`."""
        for name in names:
            save_checkpoint(self.folder / name, content)
        self.saved_step, self.saved_at = content["step"], time.monotonic()


def check_free_space(folder: Path, config: TrainConfig, model: nn.Module) -> None:
    """Raise a ValueError if the disk can't hold the checkpoints of a run: best, last, the one being written, and the
    periodic ones."""
    weights = count_bytes(model.state_dict())
    size = weights * (1 + MOMENTS[config.optimizer_type] + (config.ema_decay > 0))
    periodic = config.keep_periodic and config.keep_periodic + 1  # the oldest is deleted after the newest is saved
    number = 3 + min(periodic, config.epochs // config.save_period)
    present = sum(path.stat().st_size for path in folder.glob(f"*{SUFFIX}"))
    needed, free = number * size - present, free_bytes(folder)
    if needed > free:
        raise ValueError(
            f"save_dir={config.save_dir!r}: {number} checkpoints of up to {format_bytes(size)} need "
            f"{format_bytes(needed)} more, {format_bytes(free)} are free; free some space, set save_dir to another "
            f"disk, or lower keep_periodic ({config.keep_periodic})"
        )
