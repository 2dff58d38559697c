"""Checkpoints: safetensors files, written atomically and with checksums."""

from __future__ import annotations

import re
import shutil
from collections.abc import Set
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from nets.arguments import check_arguments
from nets.weights import tree
from nets.weights.pieces import FOLDER, Pieces
from nets.weights.safe_load import is_safetensors, open_safely, read_header
from utils.config.setting import has_type
from utils.config.train_config import check_saved
from utils.runs.history import COLUMNS
from utils.system.files import WriteError, format_bytes, free_bytes, try_unlink, write_whole

FORMAT_VERSION = 7
OLD_VERSIONS, OLD_SUFFIX = (4, 5, 6), ".pth"
"""The formats of earlier versions, which are still read: 4 was pickled, in files with this suffix."""
SUFFIX = ".safetensors"
LAST = f"last_epoch_weights{SUFFIX}"
BEST = f"best_epoch_weights{SUFFIX}"
PERIODIC = re.compile(r"ep(\d+)-loss.*\.safetensors")
TRAINING_STATE = ("weights_in_training", "optimizer")
"""Groups of tensors that a classifier doesn't need."""
KEYS: dict[str, Any] = {
    # the classifier
    "format_version": int,
    "model": dict[str, Any],
    "weights": dict[str, Tensor],
    "class_names": list[str],
    "preprocessing": dict[str, Any],
    "config": dict[str, Any],
    "calibration": dict[str, Any],
    "origin": dict[str, str],
    # the training state
    "weights_in_training": dict[str, Tensor],
    "optimizer": dict[str, Any],
    "scaler": dict[str, float],
    "epoch": int,
    "step": int,
    "epoch_losses": Tensor,
    "epoch_hits": Tensor,
    "micro_batches": int,
    "start": dict[str, Tensor],
    "lowest": dict[str, Tensor],
    "best_val_loss": float,
    "history": list[dict[str, float]],
    "finished": bool,
    "lists": dict[str, str],
    "environment": dict[str, Any],
}
"""The keys of a checkpoint, and the types of their values."""
SCALER = {"scale", "growth_factor", "backoff_factor", "growth_interval", "_growth_tracker"}
"""The keys of the loss scaler's state, which is empty if there is none."""
COUNTS, MAX_COUNT = ("epoch", "step", "micro_batches"), 1 << 53


class SaveError(OSError):
    """A checkpoint can't be written; earlier ones are intact."""


def save_checkpoint(path: str | Path, content: dict[str, Any], pieces: Pieces | None = None) -> None:
    """Write `content`, plain types and tensors by the names in `KEYS`, to `path` atomically, with a checksum. The
    tensors in `pieces` are written already.

    Raises:
        SaveError: the disk is full or can't be written to; `path` is unchanged.
    """
    assert content.keys() | {"format_version"} == KEYS.keys(), content.keys() ^ KEYS.keys()
    path = Path(path)
    note = {"step": content["step"], "finished": content["finished"]}
    try:
        with write_whole(path) as file:
            tree.write_tree(file, {"format_version": FORMAT_VERSION} | content, note, pieces)
    except WriteError as error:
        raise save_error(path, content, error) from error


def save_error(path: Path, content: dict[str, Any], error: OSError) -> SaveError:
    """The error of a checkpoint that can't be written to `path`."""
    return SaveError(
        f"{path} can't be written ({error.strerror}): it needs {format_bytes(count_bytes(content))}, "
        f"{format_bytes(free_bytes(path.parent))} are free, and earlier checkpoints are intact; free some space "
        f"or lower keep_periodic, then resume the run"
    )


def amend_checkpoint(path: Path, changes: dict[str, Any], whole: bool = False) -> None:
    """Replace some values of a checkpoint. Tensors that are in other files stay there, unless it becomes `whole`.

    Raises:
        SaveError: it can't be written; it is unchanged.
        FileNotFoundError, ValueError: it can't be read.
    """
    pieces = None if whole else _pieces_of(path)
    save_checkpoint(path, load_checkpoint(path) | changes, pieces)


def _pieces_of(path: Path) -> Pieces | None:
    """Where the tensors of a checkpoint are that aren't in its file."""
    return tree.read_pieces(read_header(path))


class Progress(NamedTuple):
    """The progress of a run according to the note at the end of a checkpoint file."""

    step: int
    finished: bool


def read_progress(path: Path) -> Progress | None:
    """The note of a checkpoint, without verifying its checksum; None if there is none."""
    note = tree.read_note(path) or {}
    step, finished = note.get("step"), note.get("finished")
    return Progress(step, finished) if type(step) is int and type(finished) is bool else None


def count_bytes(content: Any) -> int:
    """The size in bytes of all tensors in nested dicts and lists."""
    if isinstance(content, Tensor):
        return content.nbytes
    if isinstance(content, dict | list | tuple):
        return sum(map(count_bytes, content.values() if isinstance(content, dict) else content))
    return 0


def load_checkpoint(path: str | Path, training_state: bool = True) -> dict[str, Any]:
    """Read a checkpoint onto the CPU. Without `training_state`, the tensors of `TRAINING_STATE` are None, and their
    bytes aren't read.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, or isn't a checkpoint of this version of Thaw.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    content = _read(path, () if training_state else TRAINING_STATE) if is_safetensors(path) else open_safely(path)
    content = _upgrade(content)
    version = content.get("format_version") if isinstance(content, dict) else None
    if version is None:
        raise ValueError(f"{path} isn't a checkpoint of Thaw; to train from plain weights, set model_path in train.py")
    if version != FORMAT_VERSION:
        raise ValueError(
            f"{path} has checkpoint format {version!s:.20}, this version of Thaw reads {FORMAT_VERSION}; use the "
            f"version that wrote it"
        )
    try:
        _check_content(content, KEYS.keys() - (() if training_state else TRAINING_STATE))
    except ValueError as error:
        raise ValueError(f"{path} can't be used: {error}") from error
    return content


def _check_content(content: dict[str, Any], keys: Set[str]) -> None:
    """Raise a ValueError if the value of one of `keys` is missing or of another type."""
    if missing := sorted(KEYS.keys() - content.keys()):
        raise ValueError(f"it lacks {', '.join(missing)}")
    if wrong := sorted(name for name in keys if not has_type(content[name], KEYS[name], finite=False)):
        raise ValueError(f"of another type than in a checkpoint: {', '.join(wrong)}")
    if wrong := [name for name in COUNTS if not 0 <= content[name] < MAX_COUNT]:
        raise ValueError(f"{wrong[0]}={content[wrong[0]]!r:.40}: must be 0 or more")
    if content["scaler"] and content["scaler"].keys() != SCALER:
        raise ValueError(f"scaler must have {', '.join(sorted(SCALER))}, or nothing")
    if not all(row.keys() >= set(COLUMNS) for row in content["history"]):
        raise ValueError(f"a row of history lacks some of {', '.join(COLUMNS)}")
    for name in ("start", "lowest"):
        sizes = {tensor.shape for tensor in content[name].values()}
        if content[name].keys() not in (set(), {"losses", "correct"}) or len(sizes) > 1:
            raise ValueError(f"{name} must have losses and correct, one for each validation image, or nothing")
    if content["epoch_losses"].ndim != 1 or content["epoch_losses"].shape != content["epoch_hits"].shape:
        raise ValueError("epoch_losses and epoch_hits must have one value per step of the epoch")
    check_arguments(content["model"])
    check_saved(content["config"])


def _read(path: Path, skip: tuple[str, ...]) -> Any:
    try:
        return tree.read_tree(path, skip) if "plain" in read_header(path) else {}
    except tree.Damaged as error:
        raise ValueError(f"{path} is damaged: {error}") from error


def _upgrade(content: Any) -> Any:
    """The content of a checkpoint of an earlier version as in this one."""
    if isinstance(content, dict) and content.get("format_version") in OLD_VERSIONS:
        content = {"start": {}, "lowest": {}} | content | {"format_version": FORMAT_VERSION}
        if "arithmetic" in content:  # its name in still earlier versions
            content["environment"] = content.pop("arithmetic")
    return content


def load_newest(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """The newest intact checkpoint that a run wrote to its folder, as path and content; None if there is none. Damaged
    ones are reported."""

    def steps(path: Path) -> tuple[float, bool]:
        progress = read_progress(path)
        return progress.step if progress else float("inf"), path.name == LAST

    names = [(path, path.with_suffix(SUFFIX).name) for path in folder.iterdir() if path.suffix in (SUFFIX, OLD_SUFFIX)]
    files = [path for path, name in names if path.is_file() and (name in (LAST, BEST) or PERIODIC.fullmatch(name))]
    for path in sorted(files, key=steps, reverse=True):
        try:
            return path, load_checkpoint(path)
        except (ValueError, OSError) as error:
            print(f"warning: {error}; trying the next older checkpoint")
    return None


def prune_periodic(folder: Path, keep: int) -> None:
    """Delete all but the newest `keep` periodic checkpoints, unless the last checkpoint is damaged."""
    names = [(path, PERIODIC.fullmatch(path.name)) for path in folder.iterdir() if path.is_file()]
    periodic = {path: int(match[1]) for path, match in names if match}
    surplus = sorted(periodic, key=periodic.get)[: max(0, len(periodic) - keep)]
    if not surplus:
        return
    try:
        load_checkpoint(folder / LAST)
    except (OSError, ValueError) as error:
        print(f"warning: {error}; periodic checkpoints are not deleted")
        return
    for path in surplus:
        try_unlink(path, "it is retried after the next epoch")


def prune_pieces(folder: Path) -> None:
    """Delete the folders with tensors that no checkpoint in a run folder needs; none if one is damaged."""
    present = [path for path in folder.iterdir() if FOLDER.fullmatch(path.name) and path.is_dir()]
    if not present:
        return
    try:
        needed = {pieces.folder for path in folder.glob(f"*{SUFFIX}") if (pieces := _pieces_of(path))}
    except (OSError, ValueError) as error:
        print(f"warning: {error}; no tensors are deleted")
        return
    for path in present:
        if path.name not in needed and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)  # what can't be deleted is retried after the next checkpoint


def _old_name(name: str) -> str:
    """The name of a checkpoint in earlier versions."""
    return name.removesuffix(SUFFIX) + OLD_SUFFIX


def given_model(model: str, model_path: str) -> str:
    """The path of the model, which is given as the first word or as model_path.

    Raises:
        ValueError: both are given, or the first word is a list or a folder of images.
    """
    if model and model_path:
        raise ValueError(f"there are two models, {model} and {model_path}: remove one of them")
    if model.endswith(".txt") or (Path(model).is_dir() and model and not holds_runs(Path(model))):
        raise ValueError(f"model={model!r}: it is no checkpoint or run; give images as --data {model}")
    return model or model_path


def holds_runs(folder: Path) -> bool:
    """Whether a folder is a run or contains runs, that is checkpoints."""
    names = (BEST, LAST, _old_name(BEST), _old_name(LAST))
    return any(file.is_file() for name in names for pattern in (name, f"*/{name}") for file in folder.glob(pattern))


def find_checkpoint(path: str, name: str = BEST) -> Path:
    """The checkpoint that `path` selects: a file itself, the one called `name` in a run folder, or that of the newest
    run in a folder of runs (`logs` if `path` is empty).

    Raises:
        FileNotFoundError: there is none.
    """
    place = Path(path or "logs")
    if place.is_file():
        return place
    for own in (name, _old_name(name)):
        if path and (place / own).is_file():
            return place / own
    if path and not place.is_dir():
        raise FileNotFoundError(f"there is no checkpoint {place}")
    files = [*place.glob(f"*/{name}"), *place.glob(f"*/{_old_name(name)}")]
    runs = sorted(filter(Path.is_file, files), key=lambda file: file.stat().st_mtime_ns)
    if not runs:
        searched = f"{place}/ or its subfolders" if path else f"a run in {place}/: train first, python train.py"
        raise FileNotFoundError(f"there is no {name} in {searched}")
    return runs[-1]
