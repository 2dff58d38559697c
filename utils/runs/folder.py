"""Run folders: creation, lock, cleanup after killed runs."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from nets.weights.pieces import FOLDER
from utils.config.train_config import TrainConfig, check_saved, project_files
from utils.data.image_list import ImageList, read_list
from utils.system.files import PARTIAL, is_partial, read_json, refuse_link, write_bytes, write_json
from utils.system.folder_lock import HELD_FILE, LOCK_FILE, FolderLock, InUse

CONFIG_FILE = "config.json"
ASKED_FILE = "asked.json"
"""The settings before the program chose those that were left to it."""
EVENTS = "events.out.tfevents."
"""Prefix of TensorBoard's file names."""
LIST_FILES = {"train": "train_list.txt", "val": "val_list.txt", "test": "test_list.txt"}
CLASS_FILE = "classes.txt"


METRICS_FOLDER = Path("metrics_out")
"""Where eval.py writes results for a checkpoint outside a run folder."""
OTHER_RESULTS = "eval"
"""Folder in a run for results on other images than its own, in a folder for each list or folder of images."""


@dataclass(frozen=True)
class RunFolder:
    """A locked run folder.

    Attributes:
        path: the folder.
        lock: the lock of this process on it; None on other ranks than 0.
        checkpoint: the state to resume from; None: there is none yet.
    """

    path: Path
    lock: FolderLock | None
    checkpoint: dict[str, Any] | None

    def discard_if_new(self) -> None:
        """Release the folder, and remove it if it has no checkpoint."""
        if self.lock is None:
            return
        self.lock.release()
        if self.checkpoint is None and has_no_checkpoint(self.path):
            shutil.rmtree(self.path)
            print(f"removed {self.path}: the run ended before its first checkpoint")


def create_run_folder(config: TrainConfig, asked: TrainConfig, lists: Mapping[str, ImageList]) -> RunFolder:
    """The folder of a new run, with its settings and lists."""
    path = new_run_folder(config.save_dir, config.name)
    lock = FolderLock(path)
    write_lists(path, lists, config)
    if asked.leaves_choices:
        write_json(path / ASKED_FILE, asked.as_dict())
    write_json(path / CONFIG_FILE, config.as_dict())
    return RunFolder(path, lock, None)


def read_settings(folder: Path, name: str = CONFIG_FILE) -> dict[str, Any]:
    """The settings in a file of a run; empty if it can't be read, or one isn't valid."""
    values = read_json(folder / name)
    try:
        check_saved(values)
    except ValueError:
        return {}
    return values


def is_run(folder: Path) -> bool:
    """Whether `folder` was created by a run."""
    return all((folder / name).is_file() for name in (CONFIG_FILE, LIST_FILES["train"], LIST_FILES["val"]))


def in_run(folder: str) -> bool:
    """Whether `folder` is a run folder, or a folder of results in one."""
    return any(map(is_run, (Path(folder), *list(Path(folder).parents)[:2])))


def results_folder(checkpoint: Path, other_data: str = "") -> Path:
    """The default output folder of eval.py for a checkpoint; `other_data`: what isn't the run's own list.

    Raises:
        WriteError: it is in a linked folder of the run.
    """
    if not is_run(checkpoint.parent):
        return METRICS_FOLDER
    refuse_link(checkpoint.parent / OTHER_RESULTS)
    name = re.sub(r"[^\w.-]+", "_", other_data).strip("._")[-80:]
    return checkpoint.parent / OTHER_RESULTS / name if other_data else checkpoint.parent


def write_lists(path: Path, lists: Mapping[str, ImageList], config: TrainConfig) -> None:
    """Write the lists of a run, and copies of its test list, if there is one, and of its class file."""
    for key, images in lists.items():
        write_bytes(path / LIST_FILES[key], images.buffer.tobytes())
    for source, name in ((config.test_annotation_path, LIST_FILES["test"]), (config.classes_path, CLASS_FILE)):
        if Path(source).is_file():
            write_bytes(path / name, Path(source).read_bytes())


def new_run_folder(save_dir: str | Path, name: str = "") -> Path:
    """Create a folder in `save_dir`, named by the current time and `name`."""
    stamp = datetime.now().strftime("%Y-%m-%d_%H-%M-%S") + (f"_{name}" if name else "")
    for folder in (stamp, *(f"{stamp}_{number}" for number in range(2, 1000))):
        try:
            Path(save_dir, folder).mkdir(parents=True)
        except FileExistsError:
            continue
        return Path(save_dir, folder)
    raise FileExistsError(f"save_dir={str(save_dir)!r}: it has a thousand runs of {stamp}; set another save_dir")


def remove_leftovers(save_dir: Path) -> None:
    """Delete partial files of killed runs, and folders of runs that were killed before their settings were written."""
    files = [file for file in save_dir.glob(f"*/*{PARTIAL}") if is_partial(file) and not file.parent.is_symlink()]
    partial = {file.parent for file in files if (file.parent / LOCK_FILE).exists()}
    locks = [file for file in save_dir.glob(f"*/{LOCK_FILE}") if not file.parent.is_symlink()]
    empty = {file.parent for file in locks if not (file.parent / CONFIG_FILE).exists()}
    for folder in partial | empty:
        try:
            lock = FolderLock(folder)
        except (InUse, OSError):  # a running process, or a lock file that isn't Thaw's
            continue
        for file in filter(is_partial, folder.glob(f"*{PARTIAL}")):
            if file.is_dir():  # not Thaw's
                continue
            print(f"deleted {file}: a killed run left it incomplete")
            file.unlink(missing_ok=True)
        removable = folder in empty and has_no_checkpoint(folder)
        if removable and os.name == "posix":
            shutil.rmtree(folder)
        lock.release()
        if removable and os.name != "posix":  # Windows doesn't delete open files
            shutil.rmtree(folder, ignore_errors=True)


def has_no_checkpoint(folder: Path) -> bool:
    """Whether a run folder contains only what a run writes before its first checkpoint."""
    initial = {LOCK_FILE, HELD_FILE, ASKED_FILE, CONFIG_FILE, CLASS_FILE, *LIST_FILES.values()}
    return all(
        path.name in initial or path.name.startswith(EVENTS) or is_partial(path) or FOLDER.fullmatch(path.name)
        for path in folder.iterdir()
    )


def read_run_list(checkpoint: Path, config: Mapping[str, Any], class_names: list[str], key: str) -> ImageList | None:
    """The copy of a list (a key of `LIST_FILES`) in the run folder of a checkpoint; None if there is none. Relative
    paths in it start from the folder of the original list in `config`."""
    copy = checkpoint.with_name(LIST_FILES[key])
    if not copy.is_file():
        return None
    return replace(read_list(copy, len(class_names)), folder=os.path.dirname(list_path(config, key)))


def list_path(config: Mapping[str, Any], key: str) -> str:
    """The path of a list (a key of `LIST_FILES`) according to the settings that a run stored; "" if they aren't of a
    run."""
    if "val_annotation_path" not in config:
        return ""
    field = f"{key}_annotation_path"
    return config.get(field) or project_files(config.get("data", ""))[field]
