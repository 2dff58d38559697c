"""Checkpoints: written whole or not at all, opened without running anything in them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from nets.weights import open_safely
from utils.files import write_whole

FORMAT_VERSION = 1
LAST = "last_epoch_weights.pth"
BEST = "best_epoch_weights.pth"
WHAT_IT_IS = ("format_version", "model", "weights", "class_names", "preprocessing", "config")
HOW_FAR_IT_IS = ("optimizer", "scaler", "epoch", "step", "best_val_loss", "history")
KEYS = frozenset((*WHAT_IT_IS, *HOW_FAR_IT_IS))


def save_checkpoint(path: str | Path, content: dict[str, Any]) -> None:
    """Write `content`, plain types and tensors under the names in `KEYS`, to `path`.

    See `utils.files.write_whole`: `path` is the old file or the new one, never a part of it.
    """
    assert content.keys() | {"format_version"} == KEYS, content.keys() ^ KEYS
    with write_whole(Path(path)) as file:
        torch.save({"format_version": FORMAT_VERSION} | content, file)


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU; nothing in the file is executed.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it can't be opened, or isn't one of Thaw's checkpoints of this version.
    """
    content = open_safely(path)
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
