"""When and how the checkpoints of a run are written, and the disk space for them."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from nets.weights import tree
from nets.weights.digest import digest_file
from nets.weights.pieces import Pieces
from utils.config.train_config import TrainConfig
from utils.runs.checkpoint import SUFFIX, TRAINING_STATE, count_bytes, save_checkpoint, save_error
from utils.system.files import flush_to_disk, format_bytes, free_bytes
from utils.system.runtime import runtime

MOMENTS = {"sgd": 1, "adam": 2, "adamw": 2, "muon": 2}
"""The maximum number of tensors that an optimizer stores per parameter."""
MAX_PARAMETERS = 2_000_000_000
"""Parameters whose checkpoints rank 0 writes alone; those of larger networks are written by all ranks."""
DIVIDED_GROUPS = ("weights", *TRAINING_STATE)
"""Tensors that all ranks write, see `write_pieces`."""


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

    def write(self, content: dict[str, Any], *names: str, pieces: Pieces | None = None) -> None:
        """Write a checkpoint under each of these names, see `save_checkpoint`."""
        for name in names:
            save_checkpoint(self.folder / name, content, pieces)
        self.saved_step, self.saved_at = content["step"], time.monotonic()


def must_divide(config: TrainConfig, parameters: int) -> bool:
    """Whether all ranks write checkpoints, see `TrainConfig.divide_checkpoints`."""
    if config.divide_checkpoints != "auto":
        return config.divide_checkpoints == "yes"
    return runtime.world_size > 1 and parameters > MAX_PARAMETERS


def write_pieces(run: Path, content: dict[str, Any], check: Callable[[], None]) -> Pieces:
    """Write the tensors of `DIVIDED_GROUPS` in the content of a checkpoint to a new folder in that of the run, each
    rank its share, and flush them to disk. They become a checkpoint by `save_checkpoint`.

    Args:
        check: called on rank 0 before anything is written.

    Raises:
        SaveError: on all ranks, if one can't write.
    """

    def create() -> str:
        check()
        name = f"ep{content['epoch']:03d}-step{content['step']}-{secrets.token_hex(4)}"
        (run / name).mkdir()
        return name

    folder = run / runtime.first(create)
    tensors: dict[str, Tensor] = {}
    tree.split(content, "", tensors)
    digests: dict[str, dict[str, str]] = {}
    try:
        for group in DIVIDED_GROUPS:
            own = {name: tensor for name, tensor in tensors.items() if name.startswith(f"{group}/")}
            if own:
                digests[group] = _write_group(folder / group, own)
        runtime.first(lambda: flush_to_disk(folder))
    except OSError as error:
        raise save_error(folder, content, error) from error
    return Pieces(folder.name, digests)


def _write_group(folder: Path, tensors: dict[str, Tensor]) -> dict[str, str]:
    """Write a group of tensors; return the SHA-256 of the files of all ranks."""
    digests = {}
    for file in runtime.write_tensors(folder, tensors):
        flush_to_disk(file)
        digests[file.name] = digest_file(file)
    runtime.first(lambda: flush_to_disk(folder))
    return {name: digest for own in runtime.gather(digests) for name, digest in own.items()}


def check_free_space(folder: Path, config: TrainConfig, model: nn.Module) -> None:
    """Raise a ValueError if the disk can't hold the checkpoints of a run: best, last, the one being written, and the
    periodic ones."""
    weights = count_bytes(model.state_dict())
    size = weights * (1 + MOMENTS[config.optimizer_type] + (config.ema_decay > 0))
    periodic = config.keep_periodic and config.keep_periodic + 1  # the oldest is deleted after the newest is saved
    number = 3 + min(periodic, config.epochs // config.save_period)
    present = sum(path.stat().st_size for path in folder.rglob(f"*{SUFFIX}"))
    needed, free = number * size - present, free_bytes(folder)
    if needed > free:
        raise ValueError(
            f"save_dir={config.save_dir!r}: {number} checkpoints of up to {format_bytes(size)} need "
            f"{format_bytes(needed)} more, {format_bytes(free)} are free; free some space, set save_dir to another "
            f"disk, or lower keep_periodic ({config.keep_periodic})"
        )
