"""A training run in a separate process that logs the input of each step, with an optional fault."""

from __future__ import annotations

import hashlib
import io
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from torch.utils.tensorboard import SummaryWriter

import train
from nets.weights import tree
from nets.weights.pieces import Pieces
from utils.config.train_config import TrainConfig
from utils.data.loader import batch_paths
from utils.runs import saving
from utils.runs.checkpoint import FORMAT_VERSION, SUFFIX
from utils.system import files
from utils.system.signals import Stopped
from utils.training.trainer import Trainer

STEPS = "steps.log"


def die(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def train_in(folder: Path, settings: dict[str, Any], fault: str = "", number: int = 0) -> None:
    """Run `train.main` in `folder` with its output in `output.log`, and exit as `train.py` would."""
    os.chdir(folder)
    output = Path("output.log").open("a", buffering=1)  # noqa: SIM115
    os.dup2(output.fileno(), 1)
    os.dup2(output.fileno(), 2)
    sys.stdout = sys.stderr = output
    torch.set_num_threads(1)
    SummaryWriter.add_graph = lambda *arguments: None  # it takes a second in which kills test nothing
    log_steps()
    if fault:
        plant(fault, number)
    try:
        train.main(TrainConfig(**settings))
    except Stopped as stopped:
        sys.exit(stopped.status)


def log_steps() -> None:
    """Log the number, image names and input digest of each step."""
    train_step = Trainer.train_step
    log = os.open(STEPS, os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    def logging_step(self, inputs, targets, optimizer, batch_size):
        images = ",".join(Path(path).name for path in batch_paths(self.epoch.loader, self.epoch.done))
        sha = hashlib.sha256(inputs.contiguous().view(torch.uint8).numpy().tobytes() + targets.numpy().tobytes())
        step = self.step
        result = train_step(self, inputs, targets, optimizer, batch_size)
        os.write(log, f"{step} {images} {sha.hexdigest()}\n".encode())
        return result

    Trainer.train_step = logging_step


def plant(fault: str, number: int) -> None:
    """Kill the process at a point of saving, at the `number`-th time it is reached (counted from 0)."""
    left = [number]

    def now() -> bool:
        left[0] -= 1
        return left[0] < 0

    write, replace, unlink = tree.write_tree, os.replace, Path.unlink
    calibrate = train.calibrate_checkpoint

    def half(file, *arguments):
        whole = io.BytesIO()
        write(whole, *arguments)
        file.write(whole.getvalue()[: len(whole.getvalue()) // 2])
        file.flush()
        die()

    def before_flush(*arguments):
        write(*arguments)
        if now():
            die()

    def around_replace(old, new):
        if fault == "before rename" and str(new).endswith(SUFFIX) and now():
            die()
        replace(old, new)
        if fault == "after rename" and str(new).endswith(SUFFIX) and now():
            die()

    def finishing(*arguments):
        """Die before or after the rename of one of the final files: embeddings, best, last."""

        def dying_replace(old, new):
            if left[0] == 0:
                die()
            replace(old, new)
            if left[0] == 1:
                die()
            left[0] -= 2

        files.os.replace = dying_replace
        return calibrate(*arguments)

    def dying_unlink(path, missing_ok=False):
        unlink(path, missing_ok)
        if path.name.startswith("ep") and path.suffix == SUFFIX and now():
            die()

    if fault == "at open":
        tree.write_tree = lambda *arguments: die() if now() else write(*arguments)
    elif fault in ("mid-write", "plain mid-write"):
        tree.write_tree = lambda *arguments: half(*arguments) if now() else write(*arguments)
    elif fault == "before flush":
        tree.write_tree = before_flush
    elif fault in ("before rename", "after rename"):
        files.os.replace = around_replace
    elif fault == "finishing":
        train.calibrate_checkpoint = finishing
    elif fault == "in retention":
        Path.unlink = dying_unlink
    if fault.startswith("plain"):
        saving.save_checkpoint = plain_save


def plain_save(path: Path, content: dict[str, Any], pieces: Pieces | None) -> None:
    """Save without an atomic rename."""
    with path.open("wb") as file:
        tree.write_tree(file, {"format_version": FORMAT_VERSION} | content, {}, pieces)
