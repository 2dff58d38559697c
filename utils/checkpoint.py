"""Checkpoints: written whole or not at all, opened without running anything in them."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import torch

FORMAT_VERSION = 1
LAST = "last_epoch_weights.pth"
BEST = "best_epoch_weights.pth"
# What the classifier is, and how far the run has come.
CLASSIFIER_KEYS = frozenset(["format_version", "model", "weights", "class_names", "preprocessing", "config"])
RUN_KEYS = frozenset(["optimizer", "scaler", "epoch", "step", "best_val_loss", "history"])
KEYS = CLASSIFIER_KEYS | RUN_KEYS


def save_checkpoint(path: str | Path, content: dict[str, Any]) -> None:
    """Write `content`, plain types and tensors under the names in `KEYS`, to `path`.

    It is written beside `path`, flushed to disk and renamed, so that `path` is the old file or the new one, never a
    part of it.
    """
    assert content.keys() | {"format_version"} == KEYS, content.keys() ^ KEYS
    path = Path(path)
    unfinished = path.with_name(path.name + ".tmp")
    with unfinished.open("wb") as file:
        torch.save({"format_version": FORMAT_VERSION} | content, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(unfinished, path)


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU; nothing in the file is executed.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it isn't one of Thaw's checkpoints, or one of a later version.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no checkpoint {path}")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise ValueError(f"{path} can't be opened as a checkpoint: {error}") from error
    if not isinstance(content, dict) or "format_version" not in content:
        raise ValueError(f"{path} is none of Thaw's checkpoints; plain weights go into model_path of train.py")
    if content["format_version"] != FORMAT_VERSION:
        raise ValueError(
            f"{path} has checkpoint format {content['format_version']}, this is for {FORMAT_VERSION}: use the version "
            f"of Thaw that wrote it"
        )
    if KEYS - content.keys():
        raise ValueError(f"{path} can't be used: it lacks {', '.join(sorted(KEYS - content.keys()))}")
    return content


def find_checkpoint(path: str, name: str = BEST, save_dir: str | Path = "logs") -> Path:
    """The checkpoint that `path` means: a file itself, in a run's folder the one called `name`; if empty, in `save_dir`
    that of the newest run.

    Raises:
        FileNotFoundError: there is none.
    """
    if path:
        found = Path(path, name) if Path(path).is_dir() else Path(path)
        if not found.is_file():
            raise FileNotFoundError(f"there is no checkpoint {found}")
        return found
    runs = sorted(Path(save_dir).glob(f"*/{name}"), key=lambda file: file.stat().st_mtime_ns)
    if not runs:
        raise FileNotFoundError(f"there is no run with a {name} in {save_dir}/: train first, python train.py")
    return runs[-1]
