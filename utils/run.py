"""One run: its folder, how far it has come, and what is saved and logged after each epoch."""

from __future__ import annotations

import time
from datetime import datetime
from pathlib import Path
from typing import Any

from torch import nn
from torch.optim import Optimizer

from utils.checkpoint import BEST, LAST, find_checkpoint, load_checkpoint, save_checkpoint
from utils.config import TrainConfig
from utils.engine import Trainer
from utils.freeze import Stage
from utils.report import RunLog
from utils.transforms import Preprocessing

# A resumed run may have other values of these; all others decide what comes out of it.
FREE_FIELDS = frozenset(
    [
        *("resume", "model_path", "pretrained", "activation", "save_period", "save_dir", "num_workers", "device"),
        *("cache_dir", "feature_cache_gb", "max_bad_fraction"),
    ]
)


def load_resumable(config: TrainConfig, class_names: list[str]) -> dict[str, Any] | None:
    """The last checkpoint of the run that `config.resume` names; None if it names none.

    Raises:
        FileNotFoundError: there is no such run.
        ValueError: it isn't a run's folder or last checkpoint, or the run has other settings or classes.
    """
    if not config.resume:
        return None
    file = find_checkpoint(config.resume, LAST)
    if file.name != LAST:
        raise ValueError(
            f"resume={config.resume!r}: a run goes on from its last checkpoint, so give its folder; to begin a new run "
            f"with the weights of another checkpoint, set model_path"
        )
    checkpoint = load_checkpoint(file)
    then, now = checkpoint["config"], config.as_dict()
    changed = {name for name in then.keys() | now.keys() if name not in FREE_FIELDS and then.get(name) != now.get(name)}
    if changed:
        told = ", ".join(f"{name} was {then.get(name)!r} and is {now.get(name)!r}" for name in sorted(changed))
        raise ValueError(
            f"resume={config.resume!r}: {told}; give the settings, flags too, that the run was started with (they are "
            f"in {file.parent / 'config.json'}), or begin a new run with model_path"
        )
    if checkpoint["class_names"] != class_names:
        raise ValueError(
            f"resume={config.resume!r}: that run has the classes {', '.join(checkpoint['class_names'])}, and "
            f"{config.classes_path} names {', '.join(class_names)}"
        )
    return checkpoint


class Run:
    """A new run, or with `resumed`, its last checkpoint, one that goes on: the trainer is brought to where it was.

    Attributes:
        folder: the run's folder.
        history: a row of numbers for each finished epoch.
    """

    def __init__(
        self,
        config: TrainConfig,
        model: nn.Module,
        trainer: Trainer,
        class_names: list[str],
        resumed: dict[str, Any] | None,
    ) -> None:
        self.config = config
        self.model = model
        self.trainer = trainer
        self.identity = {
            "model": model.arguments,
            "class_names": class_names,
            "preprocessing": Preprocessing.from_dict(config.as_dict()).as_dict(),
            "config": config.as_dict(),
        }
        self.history: list[dict[str, float]] = []
        self._resumed = resumed
        if resumed:
            self.folder = find_checkpoint(config.resume, LAST).parent
            self.trainer.load_state_dict(resumed)
            self.history = resumed["history"]
            print(f"going on with {self.folder} after epoch {self.epoch}")
        else:
            self.folder = new_run_folder(config.save_dir)
        self.log = RunLog(self.folder, config.as_dict(), trainer.step)
        self._epoch_started = time.perf_counter()

    @property
    def epoch(self) -> int:
        """The next epoch, counted from 0."""
        return len(self.history)

    def restore_optimizer(self, optimizer: Optimizer, stage: Stage) -> None:
        """If the run that goes on was cut off inside `stage`, give its new optimizer the state of the old."""
        if self._resumed and self.epoch > stage.start:
            # The groups' options stay as they were just made: `fused` depends on the device.
            groups = optimizer.state_dict()["param_groups"]
            optimizer.load_state_dict({"state": self._resumed["optimizer"]["state"], "param_groups": groups})

    def finish_epoch(self, numbers: dict[str, float], optimizer: Optimizer) -> None:
        """Print, log and save an epoch: as the last, as the best if none had a lower validation loss, and by itself
        every `save_period` epochs."""
        now = time.perf_counter()
        row = {"epoch": self.epoch + 1} | numbers | {"seconds": now - self._epoch_started}
        self._epoch_started = now
        self.history.append(row)
        best_val_loss = min(earlier["val_loss"] for earlier in self.history)
        is_best = row["val_loss"] == best_val_loss
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
                "best_val_loss": best_val_loss,
                "history": self.history,
            }
        )
        # Logged before it is saved: a run cut off in between logs this epoch again, and what it logged first is hidden.
        self.log.log_epoch(self.history, self.trainer.step)
        if self.epoch % self.config.save_period == 0:
            name = f"ep{self.epoch:03d}-loss{row['loss']:.3f}-val_loss{row['val_loss']:.3f}.pth"
            save_checkpoint(self.folder / name, content)
        if is_best:
            save_checkpoint(self.folder / BEST, content)
        save_checkpoint(self.folder / LAST, content)


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
