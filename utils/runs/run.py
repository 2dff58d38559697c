"""One run: how far it has come, and when that is saved and logged."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from nets.network import FreezableNetwork
from utils.config.train_config import FREE_FIELDS, TrainConfig
from utils.data.image_list import ImageList
from utils.data.preprocessing import Preprocessing
from utils.modeling.build import of_size
from utils.runs.checkpoint import (
    BEST,
    LAST,
    SaveError,
    count_bytes,
    load_checkpoint,
    prune_periodic,
    read_progress,
    save_checkpoint,
)
from utils.runs.folder import RunFolder
from utils.runs.log import RunLog
from utils.system.digests import TRAINING_CODE, code_digest
from utils.system.files import format_bytes, free_bytes
from utils.system.signals import Stopped, WorkerDied, clear_pending, defer_signals
from utils.training.stages import Stage
from utils.training.trainer import REMEDY, NonFiniteLoss, Trainer

MOMENTS = {"sgd": 1, "adam": 2, "adamw": 2, "muon": 2}
"""Tensors that an optimizer keeps beside each parameter, at most."""


class Run:
    """A new run, or one that goes on from a checkpoint: the trainer is brought to where it was.

    Attributes:
        folder: the run's folder.
        history: a row of numbers for each finished epoch.
        finished: whether nothing is left to do, calibration included.

    Args:
        config: the settings.
        model: the network.
        trainer: what trains it.
        class_names: name of each class id.
        lists: the images, by the keys of `utils.runs.folder.LIST_FILES`.
        folder: the run's, from `utils.runs.resume.open_run`.
        origin: where the weights that it began with were from.
    """

    def __init__(
        self,
        config: TrainConfig,
        model: FreezableNetwork,
        trainer: Trainer,
        class_names: list[str],
        lists: Mapping[str, ImageList],
        folder: RunFolder,
        origin: Mapping[str, str],
    ) -> None:
        self.config = config
        self.model = model
        self.trainer = trainer
        self.folder = folder.path
        self._opened = folder
        self.optimizer: Optimizer | None = None
        self.identity = {
            "class_names": class_names,
            "config": config.as_dict(),
            "origin": dict(origin),
            "lists": {key: images.digest() for key, images in lists.items()},
            "arithmetic": {
                "torch": str(torch.__version__),
                "device": trainer.device.type,
                "precision": trainer.precision,
                "threads": torch.get_num_threads(),
                "code": code_digest(TRAINING_CODE),
            },
        }
        self.history: list[dict[str, float]] = []
        self.finished = False
        self._resumed = folder.checkpoint
        if self._resumed:
            self.trainer.load_state_dict(self._resumed)
            self.history = self._resumed["history"]
            self.finished = self._resumed["finished"]
            self._report_resume(self._resumed)
        self._check_room()
        self._saved_step = trainer.step if self._resumed else -1
        self._saved_at = time.monotonic()
        self.log = RunLog(self.folder, self.history)

    def _report_resume(self, checkpoint: Mapping[str, Any]) -> None:
        within = f" and {self.trainer.done} steps" if self.trainer.done else ""
        print(f"going on with {self.folder} after epoch {self.epoch}{within}; resume=no would begin a new run")
        now = self.identity
        for name in sorted(FREE_FIELDS):
            before, value = checkpoint["config"].get(name), now["config"][name]
            if before != value and name != "resume":
                print(f"{name}: {before} -> {value}")
        for name, value in now["arithmetic"].items():
            if checkpoint["arithmetic"].get(name) != value:
                print(
                    f"warning: {name} was {checkpoint['arithmetic'].get(name)} and is {value}; the run goes on, but "
                    f"not bit for bit as without interruption"
                )

    def _check_room(self) -> None:
        """Raise a ValueError if the disk can't hold the checkpoints to come: best, last, one that is being written, and
        those of single epochs."""
        config = self.config
        if self.epoch == config.epochs or self.finished:
            return
        weights = count_bytes(self.model.state_dict())
        size = weights * (1 + MOMENTS[config.optimizer_type] + (config.ema_decay > 0))
        most_periodic = config.keep_periodic and config.keep_periodic + 1  # the oldest goes once all others are saved
        number = 3 + min(most_periodic, config.epochs // config.save_period)
        there = sum(path.stat().st_size for path in self.folder.glob("*.pth"))
        needed, free = number * size - there, free_bytes(self.folder)
        if needed > free:
            raise ValueError(
                f"save_dir={config.save_dir!r}: {number} checkpoints of up to {format_bytes(size)} take "
                f"{format_bytes(needed)} more, and {format_bytes(free)} are free; make room, set save_dir to another "
                f"disk, or lower keep_periodic ({config.keep_periodic})"
            )

    @property
    def epoch(self) -> int:
        """The next epoch, counted from 0, or the one that the run is in."""
        return len(self.history)

    @property
    def new(self) -> bool:
        """Whether it has no checkpoint yet."""
        return self._saved_step < 0

    def is_past(self, stage: Stage) -> bool:
        """Whether `stage` has had all its epochs, or is the last one and the calibrated validation loss hasn't fallen
        for `patience` epochs of it."""
        if self.epoch >= stage.end:
            return True
        if not self.config.patience or stage.end < stage.run_epochs:
            return False
        losses = [row["val_calibrated_loss"] for row in self.history[stage.start :]]
        return bool(losses) and len(losses) - 1 - losses.index(min(losses)) >= self.config.patience

    def take_up(self, optimizer: Optimizer, stage: Stage) -> None:
        """Save the state of this optimizer, and time epochs, from now on. If the run that goes on was cut off inside
        `stage`, give it that of the old one."""
        if self._resumed and (self.epoch > stage.start or self.trainer.done):
            # The groups' options stay as they were just made: `fused` depends on the device.
            groups = optimizer.state_dict()["param_groups"]
            optimizer.load_state_dict({"state": self._resumed["optimizer"]["state"], "param_groups": groups})
        self._resumed = None
        self.optimizer = optimizer
        self._epoch_started = time.monotonic()

    def after_step(self) -> None:
        """Save if `save_every_steps` or `save_every_minutes` asks for it."""
        steps, minutes = self.config.save_every_steps, self.config.save_every_minutes
        late = minutes > 0 and time.monotonic() - self._saved_at >= 60 * minutes
        if late or (steps and self.trainer.step % steps == 0):
            self.save()

    def save(self) -> None:
        """Save the run as it is as its last checkpoint, unless it has been.

        Raises:
            NonFiniteLoss: a weight isn't finite.
            SaveError: it can't be written.
        """
        if self.trainer.step > self._saved_step:
            with defer_signals():
                self._save(self._content(), LAST)

    def _save(self, content: dict[str, Any], *names: str) -> None:
        for name in names:
            save_checkpoint(self.folder / name, content)
        self._saved_step, self._saved_at = self.trainer.step, time.monotonic()

    def _content(self) -> dict[str, Any]:
        with self.trainer.evaluated_weights():
            weights = self.model.state_dict()
        if self.config.on_nan == "stop" and not self.trainer.new_losses.isfinite().all():
            first = self.trainer.step - len(self.trainer.new_losses)
            raise NonFiniteLoss(f"a loss since step {first} isn't finite; {REMEDY}")
        in_training = self.model.state_dict() if self.trainer.average else {}
        for tensors in (weights, in_training):
            wrong = [name for name, tensor in tensors.items() if not tensor.isfinite().all()]
            if wrong:
                raise NonFiniteLoss(
                    f"{len(wrong)} weights aren't finite at step {self.trainer.step}, {wrong[0]} among them, so this "
                    f"state isn't saved; lower init_lr, or set precision to bf16 or fp32"
                )
        best_loss = self.history[self.config.best_epoch(self.history)]["val_loss"] if self.history else math.inf
        return (
            self.identity
            | self.trainer.state_dict()
            | {
                "model": self.model.arguments,
                "preprocessing": Preprocessing.of(of_size(self.config, self.model)).as_dict(),
                "weights": weights,
                "weights_in_training": in_training,
                "optimizer": self.optimizer.state_dict() if self.optimizer else {},
                "epoch": self.epoch,
                "best_val_loss": best_loss,
                "history": self.history,
                "calibration": {},
                "finished": False,
            }
        )

    def finish_epoch(self, numbers: dict[str, float]) -> None:
        """Print, log and save an epoch: as the last, as the best if it is, and by itself every `save_period` epochs."""
        with defer_signals():
            now = time.monotonic()
            row = {"epoch": self.epoch + 1, "step": self.trainer.step} | numbers
            row |= {"seconds": now - self._epoch_started, "time": time.time()}
            self._epoch_started = now
            self.history.append(row)
            self.trainer.start_epoch()
            content = self._content()
            is_best = self.config.best_epoch(self.history) == self.epoch - 1
            print(format_row(row, self.config.epochs, is_best))
            # Logged before it is saved: a run cut off in between does this epoch again, and its log is made anew.
            self._log()
            names = [f"ep{self.epoch:03d}-loss{row['loss']:.3f}-val_loss{row['val_loss']:.3f}.pth"]
            periodic = names if self.config.keep_periodic and self.epoch % self.config.save_period == 0 else []
            # The best first: whichever of them a killed run goes on from, it is there.
            self._save(content, *([BEST] if is_best else []), *periodic, LAST)
            prune_periodic(self.folder, self.config.keep_periodic)

    def finish(self, calibration: dict[str, Any]) -> None:
        """Store that the run is finished, and `calibration` in the best checkpoint, of which it is, and in the last one
        if that is the same state. The best one, which is handed on, loses what only training needs, two thirds of it.
        """
        best, last = self.folder / BEST, self.folder / LAST
        with defer_signals():
            same_state = read_progress(best).step == read_progress(last).step
            found = {"calibration": calibration}
            of_best = found | {"finished": True, "optimizer": {}, "weights_in_training": {}}
            of_last = (found if same_state else {}) | {"finished": True}
            for path, added in ((best, of_best), (last, of_last)):
                save_checkpoint(path, load_checkpoint(path) | added)
            self.finished = True

    @contextmanager
    def saved_when_stopped(self) -> Iterator[None]:
        """Within it, a signal or the death of a worker has the run saved; that, or a checkpoint that can't be written,
        has it said how to go on with the run."""
        try:
            yield
        except (Stopped, WorkerDied, SaveError) as reason:
            clear_pending()
            if self.finished:
                print(f"\n{type(reason).__name__}: {self.folder} is finished")
            elif not self.new:
                try:
                    if not isinstance(reason, SaveError):
                        self.save()
                finally:
                    how = f"--resume {self.folder}" if self.config.resume == "no" else "the same command"
                    saved = f"{self.folder} is saved at step {self._saved_step}"
                    print(f"\n{type(reason).__name__}: {saved}; {how} goes on from there")
            raise

    def log_images(self, network: nn.Module, pixels: Tensor) -> None:
        """Log some training images (B, 3, height, width) uint8, and the graph of `network`."""
        try:
            self.log.log_images(network, pixels)
        except OSError as error:
            self._warn_unlogged(error)
        except RuntimeError as error:
            print(f"warning: TensorBoard gets no graph of the network, which torch can't trace ({error!s:.80})")

    def _log(self) -> None:
        try:
            self.log.log_epoch(self.history)
        except OSError as error:
            self._warn_unlogged(error)

    def close(self) -> None:
        """Finish the log, and let others write to the folder; one without a checkpoint is of no use and removed."""
        with defer_signals():
            try:
                self.log.close()
            except OSError as error:
                self._warn_unlogged(error)
            finally:
                self._opened.discard_if_new()

    def _warn_unlogged(self, error: OSError) -> None:
        """A run is worth more than its curve."""
        print(f"warning: the log in {self.folder} can't be written ({error.strerror})")


def format_row(row: Mapping[str, float], epochs: int, is_best: bool) -> str:
    """An epoch's numbers as a line."""
    skipped = f"; {row['skipped']} steps left out" if row["skipped"] else ""
    return (
        f"epoch {row['epoch']}/{epochs}: loss {row['loss']:.3f}, top-1 {row['top1']:.1%}; validation loss "
        f"{row['val_loss']:.3f}, calibrated {row['val_calibrated_loss']:.3f}, top-1 {row['val_top1']:.1%}; "
        f"{row['seconds']:.1f} s{skipped}"
        f"{' (best so far)' if is_best else ''}"
    )
