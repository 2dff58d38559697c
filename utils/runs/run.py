"""A run in progress: its history, checkpoints and log."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from nets.network import FreezableNetwork
from nets.weights.pieces import Pieces
from utils.config.train_config import TrainConfig
from utils.data.image_io import ImageError
from utils.data.preprocessing import Preprocessing
from utils.data.retry import ImagesGone
from utils.modeling.build import at_current_size
from utils.runs.checkpoint import (
    BEST,
    LAST,
    SUFFIX,
    SaveError,
    amend_checkpoint,
    load_checkpoint,
    prune_periodic,
    prune_pieces,
    read_progress,
)
from utils.runs.folder import RunFolder
from utils.runs.history import Row, format_row, select_best, start_row
from utils.runs.log import RunLog
from utils.runs.saving import Saver, must_divide, write_pieces
from utils.system.files import copy_whole
from utils.system.runtime import RankLost, runtime
from utils.system.signals import (
    Stopped,
    WorkerDied,
    clear_pending,
    defer_signals,
    is_agreed_stop,
    request_timed_save,
    take_save_request,
    take_timed_save,
)
from utils.training.datasets import Data
from utils.training.non_finite import REMEDY, NonFiniteLoss
from utils.training.optimizer import restore_state
from utils.training.sharding import copy_shards, gather_shards
from utils.training.stages import Stage
from utils.training.trainer import Trainer, build_trainer


class Run:
    """A run in progress.

    Attributes:
        history: a row of metrics for the start, epoch 0, and for each finished epoch.
        best: index in `history` of the best epoch; -1: there is none yet.
        divided: whether all ranks write the tensors of checkpoints.
        finished: whether training and calibration are done.
        optimizer: of the current stage.

    Args:
        trainer: for a resumed run, in the state of the checkpoint.
        identity: what every checkpoint stores about the run, see `utils.runs.start.describe`.
        log: of the epochs so far; None on other ranks than 0.
    """

    def __init__(
        self,
        config: TrainConfig,
        model: FreezableNetwork,
        trainer: Trainer,
        folder: RunFolder,
        identity: Mapping[str, Any],
        log: RunLog | None,
    ) -> None:
        self.config = config
        self.model = model
        self.trainer = trainer
        self.folder = folder.path
        self.identity = dict(identity)
        self.optimizer: Optimizer | None = None
        self._opened = folder
        self._resumed = folder.checkpoint
        self.history: list[Row] = self._resumed["history"] if self._resumed else []
        self.finished: bool = bool(self._resumed and self._resumed["finished"])
        self.best = select_best(self.history, config.epoch_shapes) if self.history else -1
        self.divided = must_divide(config, sum(weight.numel() for weight in model.parameters()))
        self.saver = Saver(self.folder, config, trainer.step if self._resumed else -1)
        self.log = log
        self._epoch_started = time.monotonic()

    @property
    def epoch(self) -> int:
        """The number of finished epochs."""
        return int(self.history[-1]["epoch"]) if self.history else 0

    @property
    def has_no_start(self) -> bool:
        """Whether the state before the first step has yet to be validated."""
        return not self.history and self.trainer.step == 0

    @property
    def is_new(self) -> bool:
        """Whether the run has no checkpoint yet."""
        return self.saver.saved_step < 0

    def is_past(self, stage: Stage) -> bool:
        """Whether `stage` is done: all its epochs, or, in the last stage, `patience` epochs without a lower calibrated
        validation loss."""
        if self.epoch >= stage.end:
            return True
        if not self.config.patience or stage.end < stage.run_epochs:
            return False
        losses = [row["val_calibrated_loss"] for row in self.history if row["epoch"] > stage.start]
        return bool(losses) and len(losses) - 1 - losses.index(min(losses)) >= self.config.patience

    def attach_optimizer(self, optimizer: Optimizer, stage: Stage) -> None:
        """Include this optimizer in checkpoints. If the run was interrupted within `stage`, restore its saved state."""
        if self._resumed and (self.epoch > stage.start or self.trainer.epoch.done):
            try:
                restore_state(optimizer, self._resumed["optimizer"].get("state"))
            except ValueError as error:
                raise ValueError(
                    f"{self.folder} can't be resumed: the state of its optimizer is damaged: {error}; start a new run "
                    f"with resume=no"
                ) from error
        self._resumed = None
        self.optimizer = optimizer
        self._epoch_started = time.monotonic()

    def save_if_due(self) -> None:
        """Save if a checkpoint is due, see `Saver.is_due`, or a signal requests it."""
        requested, late = take_save_request(), self.saver.is_late()
        if runtime.world_size > 1:  # all ranks save after the same step, when the clock of rank 0 says so
            if late and runtime.is_main:
                request_timed_save()
            late = take_timed_save()
        if requested or late or self.saver.is_due(self.trainer.step):
            self.save()
        if requested:
            print(f"SIGUSR1: {self.folder} is saved at step {self.saver.saved_step}; training continues")

    def save(self) -> None:
        """Save the run as its last checkpoint, unless this step has been saved.

        Raises:
            NonFiniteLoss: a weight isn't finite.
            SaveError: the checkpoint can't be written.
        """
        if self.trainer.step > self.saver.saved_step:
            with defer_signals():
                self._write(self._content(gather=not self.divided), LAST)

    def _save_alone(self) -> None:
        """Save on rank 0 without the others, which may have ended: all ranks have the same state after a step."""
        if self.trainer.step > self.saver.saved_step:
            with defer_signals():
                self._write_here(self._content(), LAST)

    def _write(self, content: dict[str, Any], *names: str) -> None:
        """Write a checkpoint under each of these names: on rank 0, or its tensors on all ranks."""
        pieces = write_pieces(self.folder, content, self._check_lock) if self.divided else None
        runtime.first(lambda: self._write_here(content, *names, pieces=pieces))
        self.saver.saved_step = content["step"]

    def _write_here(self, content: dict[str, Any], *names: str, pieces: Pieces | None = None) -> None:
        self._check_lock()
        self.saver.write(content, *names, pieces=pieces)
        prune_pieces(self.folder)

    def _check_lock(self) -> None:
        """Raise InUse on rank 0 if another process has taken over the run."""
        self._opened.lock.check()

    def join_shards(self, data: Data) -> None:
        """Continue with whole weights, in a new network and trainer: so they can be resized and frozen, and divided
        again."""
        trainer = self.trainer
        fixed = (trainer.device, trainer.precision)
        self.trainer, built = build_trainer(self.config, data, *fixed, self._content(), trainer.loss.teacher)
        self.model = built.model

    def _content(self, gather: bool = True) -> dict[str, Any]:
        """The content of a checkpoint of the current state, with whole tensors or with shards."""
        collect = gather_shards if gather else copy_shards
        with self.trainer.evaluated_weights():
            weights = collect(dict(self.model.state_dict()))
        in_training = collect(dict(self.model.state_dict())) if self.trainer.ema else {}
        self._check_finite(weights, in_training)
        return {
            **self.identity,
            **self.trainer.state_dict(),
            "model": self.model.arguments,
            "preprocessing": Preprocessing.from_config(at_current_size(self.config, self.model)).as_dict(),
            "weights": weights,
            "weights_in_training": in_training,
            "optimizer": self._optimizer_state(gather),
            "epoch": self.epoch,
            "best_val_loss": self.history[self.best]["val_loss"] if self.history else math.inf,
            "history": self.history,
            "calibration": {},
            "finished": False,
        }

    def _optimizer_state(self, gather: bool) -> dict[str, Any]:
        state = self.optimizer.state_dict() if self.optimizer else {}
        return gather_shards(state) if gather else state

    def _check_finite(self, *states: Mapping[str, Any]) -> None:
        """Raise a NonFiniteLoss if a loss or weight isn't finite, so that it doesn't overwrite a good checkpoint."""
        epoch, step = self.trainer.epoch, self.trainer.step
        if self.config.on_nan == "stop" and not epoch.new_losses.isfinite().all():
            raise NonFiniteLoss(f"a loss since step {step - len(epoch.new_losses)} isn't finite; {REMEDY}")
        for tensors in states:
            flags = torch.tensor([not runtime.own_rows(tensor)[0].isfinite().all() for tensor in tensors.values()])
            if self.trainer.sharded:
                runtime.unite(flags)
            wrong = [name for name, flag in zip(tensors, flags, strict=True) if flag]
            if wrong:
                raise NonFiniteLoss(
                    f"{len(wrong)} weight tensors aren't finite at step {step}, such as {wrong[0]}; this state isn't "
                    f"saved; lower init_lr, or set precision to bf16 or fp32"
                )

    def record_start(self, validation: dict[str, float]) -> None:
        """Print, log and save the state before the first step: it is the result if no epoch is better."""
        with defer_signals():
            self._record(start_row(validation))

    def finish_epoch(self, metrics: dict[str, float]) -> None:
        """Print, log and save an epoch: always as the last checkpoint, and as the best and a periodic one where due."""
        with defer_signals():
            self.trainer.finish_epoch()
            row = {"epoch": self.epoch + 1, "step": self.trainer.step} | metrics
            name = f"ep{row['epoch']:03d}-loss{row['loss']:.3f}-val_loss{row['val_loss']:.3f}{SUFFIX}"
            is_due = self.config.keep_periodic and row["epoch"] % self.config.save_period == 0
            self._record(row, *([name] if is_due else []))
            if runtime.is_main:
                prune_periodic(self.folder, self.config.keep_periodic)

    def _record(self, row: Row, *names: str) -> None:
        """Add a row to the history, print and log it, and save the state under `names`, as the best one if it is, and
        as the last."""
        now = time.monotonic()
        self.history.append(row | {"seconds": now - self._epoch_started, "time": time.time()})
        self._epoch_started = now
        self.best = select_best(self.history, self.config.epoch_shapes)
        content = self._content(gather=not self.divided)
        is_best = self.best == len(self.history) - 1
        print(format_row(self.history, self.config.epoch_shapes, is_best))
        # Log first: a run that is killed in between repeats the epoch and rewrites its log.
        if self.log:
            self.log.log_epoch(self.history)
        # The best one first, so that it exists if the run is killed and resumed from one of the others.
        self._write(content, *([BEST] if is_best else []), *names, LAST)

    def finish(self, fit: Callable[[], tuple[dict[str, Any], Sequence[Tensor]]]) -> None:
        """Mark the run as finished.

        The best checkpoint gets the calibration and, if there is one, the head (weight, bias) that `fit` returns, and
        is stripped of the training state, two thirds of its size. The last one gets the calibration if it is the same
        network. If a process was killed in between, `fit`, which needs the trained head, isn't called again.
        """
        best, last = self.folder / BEST, self.folder / LAST
        if runtime.first(lambda: not best.is_file()):
            print(f"warning: {best} is gone; {last.name} takes its place")
            runtime.first(lambda: copy_whole(last, best))
        progress = runtime.first(lambda: read_progress(best))
        fitted = None if progress and progress.finished else fit()
        with defer_signals():
            runtime.first(lambda: self._mark_finished(best, last, fitted))
            self.finished = True

    def _mark_finished(self, best: Path, last: Path, fitted: tuple[dict[str, Any], Sequence[Tensor]] | None) -> None:
        content = load_checkpoint(best, training_state=False)
        if fitted:
            calibration, head = fitted
            changes = {"calibration": calibration, "finished": True, "optimizer": {}, "weights_in_training": {}}
            changes["config"] = content["config"] | {"refit_head": bool(head)}  # whether it was
            if head:
                changes["weights"] = content["weights"] | dict(zip(("head.weight", "head.bias"), head, strict=True))
            amend_checkpoint(best, changes, whole=True)
            content |= changes
        same_network = content["step"] == read_progress(last).step and not content["config"]["refit_head"]
        amend_checkpoint(last, {"calibration": content["calibration"] if same_network else {}, "finished": True})
        prune_pieces(self.folder)

    @contextmanager
    def saved_when_stopped(self) -> Iterator[None]:
        """Save the run if a signal arrives, a worker dies or images can't be read within this context; then, or if
        saving fails, print how to resume."""
        try:
            yield
        except (Stopped, WorkerDied, ImageError, ImagesGone, SaveError, RankLost) as reason:
            agreed = is_agreed_stop(reason)
            clear_pending()
            if self.finished:
                print(f"\n{type(reason).__name__}: {self.folder} is finished")
            elif not self.is_new:
                try:
                    if agreed:
                        self.save()
                    elif runtime.is_main and not self.trainer.sharded and not isinstance(reason, SaveError):
                        self._save_alone()
                finally:
                    how = f"--resume {self.folder}" if self.config.resume == "no" else "the same command"
                    saved = f"{self.folder} is saved at step {self.saver.saved_step}"
                    print(f"\n{type(reason).__name__}: {saved}; {how} resumes it")
            raise

    def close(self) -> None:
        """Close the log and release the folder, see `RunFolder.discard_if_new`."""
        with defer_signals():
            try:
                if self.log:
                    self.log.close()
            finally:
                self._opened.discard_if_new()
