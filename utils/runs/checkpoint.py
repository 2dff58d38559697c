"""Checkpoints: written whole or not at all, every byte under a checksum, opened without running anything in them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nets.weights.safe_load import open_safely
from nets.weights.seal import has_checksum, read_note, seal, verify_checksum
from utils.system.files import format_bytes, free_bytes, try_unlink, write_whole

FORMAT_VERSION = 4
LAST = "last_epoch_weights.pth"
BEST = "best_epoch_weights.pth"
PERIODIC = re.compile(r"ep(\d+)-loss.*\.pth")
MODEL_KEYS: dict[str, type] = {
    "format_version": int,
    "model": dict,
    "weights": dict,
    "class_names": list,
    "preprocessing": dict,
    "config": dict,
    "calibration": dict,
    "origin": dict,
}
TRAINING_KEYS: dict[str, type] = {
    "weights_in_training": dict,
    "optimizer": dict,
    "scaler": dict,
    "epoch": int,
    "step": int,
    "epoch_losses": Tensor,
    "epoch_hits": Tensor,
    "micro_batches": int,
    "best_val_loss": float,
    "history": list,
    "finished": bool,
    "lists": dict,
    "environment": dict,
}
KEYS = MODEL_KEYS | TRAINING_KEYS
"""What a checkpoint holds: what the network is and what goes with it, and how far its training has come."""


class SaveError(OSError):
    """A checkpoint couldn't be written; those from before are as they were."""


def save_checkpoint(path: str | Path, content: dict[str, Any]) -> None:
    """Write `content`, plain types and tensors under the names in `KEYS`, to `path`, with a checksum of every byte.

    See `utils.system.files.write_whole`: `path` is the old file or the new one, never a part of it.

    Raises:
        SaveError: the disk is full, or doesn't let itself be written.
    """
    assert content.keys() | {"format_version"} == KEYS.keys(), content.keys() ^ KEYS.keys()
    path = Path(path)
    try:
        with write_whole(path) as file:
            torch.save({"format_version": FORMAT_VERSION} | content, file)
            seal(file, {"step": content["step"], "finished": content["finished"]})
    except (OSError, RuntimeError) as error:
        cause = _os_error(error)
        if cause is None:
            raise
        raise SaveError(
            f"{path} can't be written ({cause.strerror}). It takes {format_bytes(count_bytes(content))}, and "
            f"{format_bytes(free_bytes(path.parent))} are free; what was saved before is untouched. Make room, or "
            f"lower keep_periodic, and go on with the run"
        ) from error


class Progress(NamedTuple):
    """How far a checkpoint says it is, without being opened: its steps, and whether its run is finished."""

    step: int
    finished: bool


def read_progress(path: Path) -> Progress | None:
    """What a checkpoint's note says, unchecked; None if there is none."""
    note = read_note(path) or {}
    step, finished = note.get("step"), note.get("finished")
    return Progress(step, finished) if type(step) is int and type(finished) is bool else None


def count_bytes(content: Any) -> int:
    """Bytes of all tensors in nested dicts and lists."""
    if isinstance(content, Tensor):
        return content.nbytes
    if isinstance(content, dict | list | tuple):
        return sum(map(count_bytes, content.values() if isinstance(content, dict) else content))
    return 0


def _os_error(error: BaseException | None) -> OSError | None:
    """The operating system's error behind `error`: torch's writer raises one of its own on top."""
    while error is not None and not isinstance(error, OSError):
        error = error.__context__
    return error


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU; nothing in the file is executed.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, can't be opened, or isn't one of Thaw's checkpoints of this version.
    """
    content = open_safely(path)
    if not isinstance(content, dict) or "format_version" not in content:
        raise ValueError(f"{path} is none of Thaw's checkpoints; plain weights go into model_path of train.py")
    if content["format_version"] != FORMAT_VERSION:
        raise ValueError(
            f"{path} has checkpoint format {content['format_version']}, this is for {FORMAT_VERSION}: use the version "
            f"of Thaw that wrote it"
        )
    if "arithmetic" in content:  # its name in earlier versions
        content["environment"] = content.pop("arithmetic")
    wrong = [name for name, kind in KEYS.items() if not isinstance(content.get(name), kind)]
    if wrong:
        raise ValueError(f"{path} can't be used: it lacks {', '.join(sorted(wrong))}")
    if not has_checksum(Path(path)):
        raise ValueError(f"{path} is damaged: it doesn't end with a checksum, so it was cut off or changed")
    return content


def load_newest(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """The checkpoint in a run's folder that is newest and whole, of those that the run wrote; None if there is
    none. What is wrong with those that claim to be farther is printed."""

    def steps(path: Path) -> tuple[float, bool]:
        progress = read_progress(path)
        return progress.step if progress else float("inf"), path.name == LAST

    own = [path for path in folder.glob("*.pth") if path.name in (LAST, BEST) or PERIODIC.fullmatch(path.name)]
    for path in sorted(own, key=steps, reverse=True):
        try:
            return path, load_checkpoint(path)
        except (ValueError, OSError) as error:
            print(f"warning: {error}; looking for the newest one before it")
    return None


def prune_periodic(folder: Path, keep: int) -> None:
    """Delete all but the newest `keep` of the checkpoints of single epochs, if the last one is seen to be whole."""
    periodic = {path: int(match[1]) for path in folder.glob("ep*.pth") if (match := PERIODIC.fullmatch(path.name))}
    surplus = sorted(periodic, key=periodic.get)[: max(0, len(periodic) - keep)]
    if not surplus:
        return
    try:
        verify_checksum(folder / LAST)
    except (OSError, ValueError) as error:
        print(f"warning: {error}; no other checkpoint is deleted")
        return
    for path in surplus:
        try_unlink(path, "it is tried again after the next epoch")


def find_checkpoint(path: str, name: str = BEST) -> Path:
    """The checkpoint that `path` means: a file itself, in a run's folder the one called `name`, in a folder of runs, as
    `save_dir` is, that of the newest; if empty, of the newest in `logs`.

    Raises:
        FileNotFoundError: there is none.
    """
    place = Path(path or "logs")
    if place.is_file():
        return place
    if path and (place / name).is_file():
        return place / name
    if path and not place.is_dir():
        raise FileNotFoundError(f"there is no checkpoint {place}")
    runs = sorted(place.glob(f"*/{name}"), key=lambda file: file.stat().st_mtime_ns)
    if not runs:
        nowhere = f"{place}/, nor in a folder in it" if path else f"a run in {place}/: train first, python train.py"
        raise FileNotFoundError(f"there is no {name} in {nowhere}")
    return runs[-1]
