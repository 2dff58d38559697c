"""Starting and resuming runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from utils.config.recipe import Choice
from utils.config.train_config import RESUMABLE_FIELDS
from utils.data.image_list import ImageList
from utils.modeling.build import BuiltNetwork
from utils.runs.checkpoint import LAST, load_checkpoint
from utils.runs.folder import RunFolder
from utils.runs.log import RunLog
from utils.runs.resume import open_run
from utils.runs.run import Run
from utils.runs.saving import check_free_space
from utils.runs.setup import Setup
from utils.runs.teacher import load_teacher
from utils.system.digests import TRAINING_CODE, code_digest
from utils.system.runtime import runtime
from utils.system.text import count_of
from utils.training.trainer import Trainer, build_trainer


def start_or_resume(setup: Setup) -> tuple[Run, list[Choice]]:
    """The run that the settings select, new or in its saved state, and the settings that its weights determined.

    Raises:
        FileNotFoundError, ValueError, InUse, SaveError: see `open_run`; or the weights can't be used.
    """
    config, data = setup.config, setup.data
    lists = {"train": data.train_images, "val": data.val_images}
    folder = _open_on_all_ranks(setup, lists)
    print(f"run       {folder.path} ({_progress(folder)})")
    try:
        teacher = load_teacher(config, data.class_names, setup.device, setup.precision)
        trainer, built = build_trainer(config, data, setup.device, setup.precision, folder.checkpoint, teacher)
        identity = describe(built, trainer, data.class_names, lists)
        if teacher:
            identity["environment"]["teacher"] = teacher.digest
        runtime.check_same(identity["environment"] | {"lists": identity["lists"], "config": identity["config"]})
        checkpoint = folder.checkpoint
        if checkpoint:
            _report_changes(identity, checkpoint)
        if not checkpoint or not (checkpoint["finished"] or checkpoint["epoch"] == config.epochs):
            runtime.first(lambda: check_free_space(folder.path, built.config, built.model))
        log = RunLog(folder.path, checkpoint["history"] if checkpoint else []) if runtime.is_main else None
        run = Run(built.config, built.model, trainer, folder, identity, log)
    except BaseException:
        folder.discard_if_new()
        raise
    return run, built.choices


def _open_on_all_ranks(setup: Setup, lists: dict[str, ImageList]) -> RunFolder:
    """Open the run on rank 0, and on the others what it has opened."""
    opened: list[RunFolder] = []

    def open_first() -> tuple[Path, bool]:
        opened.append(open_run(setup.config, setup.data.class_names, lists, setup.asked))
        return opened[0].path, opened[0].checkpoint is not None

    path, resumed = runtime.first(open_first)
    if opened:
        return opened[0]
    try:
        return RunFolder(path, None, load_checkpoint(path / LAST) if resumed else None)
    except FileNotFoundError as error:
        raise ValueError(f"save_dir={setup.config.save_dir!r}: all machines need the same folder; {error}") from error


def describe(
    built: BuiltNetwork, trainer: Trainer, class_names: list[str], lists: dict[str, ImageList]
) -> dict[str, Any]:
    """What every checkpoint of a run stores about it, apart from the training state."""
    return {
        "class_names": class_names,
        "config": built.config.as_dict(),
        "origin": dict(built.origin),
        "lists": {key: images.digest() for key, images in lists.items()},
        "environment": {
            "torch": str(torch.__version__),
            "device": trainer.device.type,
            "precision": trainer.precision,
            "threads": torch.get_num_threads(),
            "code": code_digest(TRAINING_CODE),
        },
    }


def _progress(folder: RunFolder) -> str:
    """How far the run had got before this start."""
    if folder.checkpoint is None:
        return "new"
    epoch, steps = folder.checkpoint["epoch"], len(folder.checkpoint["epoch_losses"])
    done = [f"epoch {epoch}"] * (epoch > 0) + [count_of(steps, "step")] * (steps > 0 or epoch == 0)
    return f"resumed after {' and '.join(done)}"


def _report_changes(identity: dict[str, Any], checkpoint: dict[str, Any]) -> None:
    """Print which settings, and what else in the environment, changed since the checkpoint."""
    for name in sorted(RESUMABLE_FIELDS - {"resume"}):
        before, value = checkpoint["config"].get(name), identity["config"].get(name)
        if before != value:
            print(f"{name}: {before} -> {value}")
    for name, value in identity["environment"].items():
        if checkpoint["environment"].get(name) != value:
            print(
                f"warning: {name} was {checkpoint['environment'].get(name)} and is {value}; the result won't be "
                f"bit-identical to that of an uninterrupted run"
            )
