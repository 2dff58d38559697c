"""A run's folder: made, kept to one writer, tidied up after runs that were killed."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from utils.config.train_config import TrainConfig
from utils.data.image_list import ImageList, read_list
from utils.system.files import PARTIAL, write_bytes, write_json
from utils.system.folder_lock import LOCK_FILE, FolderLock, InUse

CONFIG_FILE = "config.json"
ASKED_FILE = "asked.json"
"""The settings before a recipe chose what they left open."""
EVENTS = "events.out.tfevents."
"""What the names of TensorBoard's files begin with."""
LIST_FILES = {"train": "train_list.txt", "val": "val_list.txt"}
METRICS_FOLDER = Path("metrics_out")
"""Folder for what eval.py finds of a checkpoint that lies in no run's."""


@dataclass(frozen=True)
class RunFolder:
    """A run's folder, which nobody else writes to.

    Attributes:
        path: the folder.
        lock: to be released at the end.
        checkpoint: what the run goes on from; None: it is at its beginning.
    """

    path: Path
    lock: FolderLock
    checkpoint: dict[str, Any] | None

    def discard_if_new(self) -> None:
        """Let others write to the folder. One of a run that came to nothing is removed; one that goes on, or has been
        saved, stays as it is."""
        self.lock.release()
        if self.checkpoint is None and has_no_checkpoint(self.path):
            shutil.rmtree(self.path)
            print(f"{self.path} is removed: the run came to nothing that could be saved")


def create_run_folder(config: TrainConfig, asked: TrainConfig, lists: Mapping[str, ImageList]) -> RunFolder:
    """A new run, whose settings and lists are on the disk before anything else."""
    path = new_run_folder(config.save_dir)
    print(f"a new run, in {path}")
    lock = FolderLock(path)
    write_lists(path, lists)
    if asked.recipe == "auto":
        write_json(path / ASKED_FILE, asked.as_dict())
    write_json(path / CONFIG_FILE, config.as_dict())
    return RunFolder(path, lock, None)


def is_run(folder: Path) -> bool:
    """Whether training made it."""
    return all((folder / name).is_file() for name in (CONFIG_FILE, *LIST_FILES.values()))


def results_folder(checkpoint: Path) -> Path:
    """Where eval.py's findings of a checkpoint go, unless told."""
    return checkpoint.parent if is_run(checkpoint.parent) else METRICS_FOLDER


def write_lists(path: Path, lists: Mapping[str, ImageList]) -> None:
    for key, images in lists.items():
        write_bytes(path / LIST_FILES[key], images.buffer.tobytes())


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


def remove_leftovers(save_dir: Path) -> None:
    """Delete what killed runs left half-written: files, and folders that a run hadn't yet begun in."""
    half_written = {stray.parent for stray in save_dir.glob(f"*/*{PARTIAL}") if (stray.parent / LOCK_FILE).exists()}
    never_started = {
        file.parent for file in save_dir.glob(f"*/{LOCK_FILE}") if not (file.parent / CONFIG_FILE).exists()
    }
    for folder in half_written | never_started:
        try:
            lock = FolderLock(folder)
        except (InUse, OSError):  # it is written to, or belongs to somebody else
            continue
        for stray in folder.glob(f"*{PARTIAL}"):
            print(f"{stray}, left half-written by a run that was cut off, is deleted")
            stray.unlink(missing_ok=True)
        stray = folder in never_started and has_no_checkpoint(folder)
        if stray and os.name == "posix":
            shutil.rmtree(folder)
        lock.release()
        if stray and os.name != "posix":  # Windows deletes no file that is open
            shutil.rmtree(folder, ignore_errors=True)


def has_no_checkpoint(folder: Path) -> bool:
    """Whether there is nothing in a run's folder but what a run makes before its first checkpoint."""
    made = {LOCK_FILE, ASKED_FILE, CONFIG_FILE, *LIST_FILES.values()}
    return all(
        path.name in made or path.name.startswith(EVENTS) or path.name.endswith(PARTIAL) for path in folder.iterdir()
    )


def read_run_list(checkpoint: Path, config: Mapping[str, Any], class_names: list[str], key: str) -> ImageList | None:
    """The training or validation list ("train" or "val") that a checkpoint's run began with, as its folder has it; None
    if it hasn't. `config` is the run's, which tells what relative paths start from."""
    copy = checkpoint.with_name(LIST_FILES[key])
    if not copy.is_file():
        return None
    return replace(read_list(copy, len(class_names)), folder=os.path.dirname(config.get(f"{key}_annotation_path", "")))
