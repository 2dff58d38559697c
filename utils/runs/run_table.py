"""A table of runs."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from utils.config.setting import has_type
from utils.config.train_config import TrainConfig
from utils.runs.checkpoint import LAST, read_progress
from utils.runs.folder import CONFIG_FILE, list_path, read_settings
from utils.runs.history import select_best
from utils.runs.log import EPOCHS
from utils.system.files import format_bytes, read_json
from utils.system.text import format_table

COLUMNS = ("run", "data", "backbone", "epochs", "validation top-1", "test top-1", "size")


def format_runs(folder: str) -> str:
    """A table of the runs in a folder, oldest first, from their small files; no checkpoint is loaded.

    Validation top-1 is that of the best epoch, test top-1 that of `eval.py` on the run's own test list; "-": unknown.

    Raises:
        FileNotFoundError: there is no run.
    """
    runs = sorted(path.parent for path in Path(folder).glob(f"*/{CONFIG_FILE}") if path.is_file())
    if not runs:
        raise FileNotFoundError(f"there is no run in {folder}/: train first, python train.py")
    return format_table([COLUMNS, *map(_row, runs)], right=COLUMNS[3:])


def _row(run: Path) -> tuple[str, ...]:
    config, metrics = read_settings(run), read_json(run / "metrics.json")
    history = _read_history(run / EPOCHS)
    progress = read_progress(run / LAST)
    state = "" if progress and progress.finished else " unfinished"
    test = metrics.get("top1") if metrics.get("data") == list_path(config, "test") else None
    if not has_type(test, float):
        test = None
    size = sum(path.stat().st_size for path in run.rglob("*") if path.is_file())
    return (
        run.name,
        Path(list_path(config, "train")).parent.as_posix(),
        str(config.get("backbone", "-")),
        f"{sum(row['epoch'] > 0 for row in history)}{state}",
        _percent(_best_top1(config, history)),
        _percent(test),
        format_bytes(size),
    )


def _read_history(path: Path) -> list[dict[str, float]]:
    """The finished epochs; none if the file is missing or damaged."""
    try:
        with path.open(newline="", encoding="utf-8") as file:
            return [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]
    except (OSError, ValueError, TypeError):
        return []


def _best_top1(config: Mapping[str, Any], history: list[dict[str, float]]) -> float | None:
    try:
        return history[select_best(history, TrainConfig.from_dict(config).epoch_shapes)]["val_top1"]
    except (KeyError, TypeError, ValueError, IndexError):
        return None


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"
