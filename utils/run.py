"""One run: its folder, how far it has come, and what is saved and logged after each epoch."""

from __future__ import annotations

import time
from datetime import datetime
from pathlib import Path

from torch import nn
from torch.optim import Optimizer

from utils.checkpoint import BEST, LAST, find_checkpoint, load_checkpoint, save_checkpoint
from utils.config import TrainConfig
from utils.engine import Trainer
from utils.freeze import Stage
from utils.report import RunLog
from utils.transforms import Preprocessing


class Run:
    """A new run, or with `config.resume` one that goes on: then model and trainer are brought to where it was.

    Attributes:
        folder: the run's folder.
        history: a row of numbers for each finished epoch.

    Raises:
        FileNotFoundError: there is no run to go on with.
        ValueError: the run to go on with is of another network or other classes.
    """

    def __init__(
        self,
        config: TrainConfig,
        model: nn.Module,
        trainer: Trainer,
        class_names: list[str],
        preprocessing: Preprocessing,
    ) -> None:
        self.config = config
        self.model = model
        self.trainer = trainer
        self.identity = {
            "model": model.arguments,
            "class_names": class_names,
            "preprocessing": preprocessing.as_dict(),
            "config": config.as_dict(),
        }
        self.history: list[dict[str, float]] = []
        self._resumed = None
        if config.resume:
            self._resume(find_checkpoint(config.resume, LAST))
        else:
            self.folder = new_run_folder(config.save_dir)
        self.log = RunLog(self.folder, config.as_dict(), trainer.step)
        self._epoch_started = time.perf_counter()

    def _resume(self, file: Path) -> None:
        self._resumed = load_checkpoint(file)
        for key in ("model", "class_names"):
            then, now = self._resumed[key], self.identity[key]
            if then != now:
                raise ValueError(f"resume={self.config.resume!r}: that run has {key} {then}, and this one {now}")
        self.model.load_state_dict(self._resumed["weights"])
        self.trainer.load_state_dict(self._resumed)
        self.history = self._resumed["history"]
        self.folder = file.parent
        print(f"going on with {file} after epoch {len(self.history)}")

    @property
    def epoch(self) -> int:
        """The next epoch, counted from 0."""
        return len(self.history)

    def restore_optimizer(self, optimizer: Optimizer, stage: Stage) -> None:
        """If the run that goes on was cut off inside `stage`, give its new optimizer the state of the old."""
        if self._resumed and self.epoch > stage.start:
            optimizer.load_state_dict(self._resumed["optimizer"])

    def finish_epoch(self, numbers: dict[str, float], optimizer: Optimizer) -> None:
        """Print, log and save an epoch: as the last, as the best if none had a lower validation loss, and by itself
        every `save_period` epochs."""
        now = time.perf_counter()
        row = {"epoch": self.epoch + 1} | numbers | {"seconds": now - self._epoch_started}
        self._epoch_started = now
        self.history.append(row)
        is_best = row["val_loss"] == min(earlier["val_loss"] for earlier in self.history)
        print(
            f"epoch {row['epoch']}/{self.config.unfreeze_epoch}: loss {row['loss']:.3f}, top-1 {row['top1']:.1%}; "
            f"validation loss {row['val_loss']:.3f}, top-1 {row['val_top1']:.1%}; {row['seconds']:.1f} s"
            f"{' (best so far)' if is_best else ''}"
        )
        content = (
            self.identity
            | self.trainer.state_dict()
            | {
                "weights": self.model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "epoch": self.epoch,
                "best_val_loss": min(earlier["val_loss"] for earlier in self.history),
                "history": self.history,
            }
        )
        if self.epoch % self.config.save_period == 0:
            name = f"ep{self.epoch:03d}-loss{row['loss']:.3f}-val_loss{row['val_loss']:.3f}.pth"
            save_checkpoint(self.folder / name, content)
        if is_best:
            save_checkpoint(self.folder / BEST, content)
        save_checkpoint(self.folder / LAST, content)
        self.log.log_epoch(self.history, self.trainer.step)


def new_run_folder(save_dir: str | Path) -> Path:
    """Make a folder in `save_dir`, named after the time."""
    stamp = datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    for name in (stamp, *(f"{stamp}_{number}" for number in range(2, 1000))):
        try:
            Path(save_dir, name).mkdir(parents=True)
        except FileExistsError:
            continue
        return Path(save_dir, name)
    raise FileExistsError(f"{save_dir} has a thousand runs of {stamp}")
