"""Cross-validation: one run per fold, validated on images that the other runs train on."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from utils.annotation import demo_digits
from utils.annotation.audit import SIMILAR_BY_NATURE, find_duplicates, grouped_images
from utils.annotation.audited_images import AuditedImages
from utils.annotation.fingerprints import Fingerprints
from utils.annotation.split import group_by_name, join_groups
from utils.config.train_config import TrainConfig
from utils.data.image_list import ImageList, list_in_memory, write_list
from utils.runs.checkpoint import LAST, load_checkpoint
from utils.runs.history import select_best
from utils.runs.resume import find_runs
from utils.system.digests import digest
from utils.system.files import make_folder, write_json
from utils.training.datasets import Data

FOLDER = "cross_validation"
RESULTS = "cross_validation.json"


@dataclass(frozen=True)
class Fold:
    """A fold: a folder with lists and a run, and the settings of the run."""

    title: str
    folder: Path
    config: TrainConfig

    def find_run(self) -> Path | None:
        """The folder of its finished run; None if there is none."""
        return next(find_runs(self.config, finished=True), None)

    def clear_cache(self) -> None:
        """Delete the cached features of its lists, which no other run can use."""
        shutil.rmtree(self.config.cache_dir, ignore_errors=True)


def make_folds(config: TrainConfig, data: Data, num_folds: int, group_regex: str) -> list[Fold]:
    """Divide the training and validation images into folds, and write their lists. Every division has its own
    folder, so rerunning the command resumes. `group_regex` is as for txt_annotation.py.

    Raises:
        ValueError: there are too few images or groups; or `resume` is a run.
    """
    if config.resume not in ("auto", "no"):
        raise ValueError(f"resume={config.resume!r}: is one run, but cross_validate starts several; give auto or no")
    images = join_lists(data)
    fold_of = assign_folds(images, num_folds, config, group_regex)
    division = digest([*data.class_names, images.buffer.tobytes(), fold_of.tobytes()])[:8]
    root = Path(config.save_dir, FOLDER, f"{num_folds}_folds_{division}")
    folds = []
    for number in range(num_folds):
        validated = fold_of == number
        title = f"fold {number + 1} of {num_folds}: validated on {validated.sum()} of {len(images)} images"
        folds.append(_prepare_fold(title, config, images, validated, root / f"fold_{number + 1}"))
    return folds


def report_folds(folds: list[Fold]) -> None:
    """Print and write the mean and standard deviation of top-1 over finished folds."""
    rows = []
    for fold in folds:
        run = fold.find_run()
        history = load_checkpoint(run / LAST)["history"]
        best = history[select_best(history, fold.config.epoch_shapes)]
        rows.append({"run": str(run), "last_top1": history[-1]["val_top1"], "best_top1": best["val_top1"]})
    path = folds[0].folder.parent / RESULTS
    write_json(path, {"folds": rows})
    config = folds[0].config
    print(format_folds(rows, selected_last=config.patience > 0 or config.head_init == "probe"))
    print(f"written to {path}. Next: the same command without --cross-validate trains the network to use")


def join_lists(data: Data) -> ImageList:
    """The training and validation images as one list, sorted by path."""
    lists = (data.train_images, data.val_images)
    entries = [(images.path(i), int(images.class_ids[i])) for images in lists for i in range(len(images))]
    # Links are not resolved: group_regex is matched against their own names.
    return list_in_memory((class_id, os.path.abspath(path)) for path, class_id in sorted(entries))


def assign_folds(images: ImageList, folds: int, config: TrainConfig, group_regex: str) -> np.ndarray:
    """The fold (n,) of each image, 0 to `folds` - 1: every class divided as evenly as its groups allow. Near-duplicates
    (except those that are similar by nature) and images of one group by name are in one fold.

    Raises:
        ValueError: a class has too few images, or groups of them.
    """
    from sklearn.model_selection import StratifiedGroupKFold  # slow to import

    paths = [images.path(i) for i in range(len(images))]
    groups = group_by_name(paths, group_regex)
    if config.data != demo_digits.FOLDER:
        cache = Fingerprints(Path(config.cache_dir, "fingerprints.sqlite"), config.max_pixels, config.allow_truncated)
        names = list(map(str, range(images.class_ids.max() + 1)))
        training = np.zeros(len(paths), np.uint8)
        findings = list(find_duplicates(AuditedImages(paths, training, images.class_ids, names, cache.read(paths))))
        groups += grouped_images(findings)
        for finding in findings:
            if finding.kind == SIMILAR_BY_NATURE:
                print(f"warning: {finding.message}")
    unit_of = {path: number for number, unit in enumerate(join_groups(paths, groups)) for path in unit}
    units = np.array([unit_of[path] for path in paths])
    fewest = min(len(np.unique(units[images.class_ids == class_id])) for class_id in np.unique(images.class_ids))
    if not 2 <= folds <= fewest:
        raise ValueError(
            f"cross_validate={folds}: give 2 to {fewest}; the smallest class has {fewest} images, counting "
            f"near-duplicates and groups once"
        )
    splitter = StratifiedGroupKFold(folds, shuffle=True, random_state=config.seed)
    fold_of = np.empty(len(images), np.int64)
    for fold, (_, validated) in enumerate(splitter.split(paths, images.class_ids, units)):
        fold_of[validated] = fold
    return fold_of


def _prepare_fold(title: str, config: TrainConfig, images: ImageList, validated: np.ndarray, folder: Path) -> Fold:
    """Write the lists of a fold into its folder."""
    make_folder(folder)
    lists = {"train_annotation_path": folder / "train.txt", "val_annotation_path": folder / "val.txt"}
    for path, which in zip(lists.values(), (~validated, validated), strict=True):
        write_list(path, [(int(images.class_ids[i]), images.path(i)) for i in np.flatnonzero(which)])
    cache_dir = str(Path(config.cache_dir, FOLDER, digest([repr(config)]), *folder.parts[-2:]))
    paths = {field: str(path) for field, path in lists.items()}
    changes = {"save_dir": str(folder), "cache_dir": cache_dir, "refit_head": False}  # it isn't in the history
    return Fold(title, folder, replace(config, **changes, **paths))


def format_folds(rows: list[dict[str, Any]], selected_last: bool) -> str:
    """Two lines with top-1 over the folds; `selected_last`: the last epoch depends on the validation images, too."""
    unbiased, biased = "not selected on these images", "selected on these images, so slightly too high"
    lines = []
    for key, what in (
        ("last_top1", f"after the last epoch, {biased if selected_last else unbiased}"),
        ("best_top1", f"at the best epoch, {biased}"),
    ):
        values = np.array([row[key] for row in rows])
        each = ", ".join(f"{value:.1%}" for value in values)
        lines.append(f"top-1 {values.mean():.1%} ± {values.std(ddof=1):.1%} ({each}) {what}")
    return "\n".join(lines)
