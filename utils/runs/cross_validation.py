"""Cross-validation: as many runs as folds, each validated on images that the others train on."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from utils.annotation.annotate import ensure_lists
from utils.annotation.audit import SIMILAR_BY_NATURE, AuditedImage, find_duplicates, linked
from utils.annotation.fingerprints import Fingerprints
from utils.annotation.folder_scan import is_demo
from utils.annotation.split import group_by_name, join_groups
from utils.config.train_config import TrainConfig
from utils.data.image_list import ImageList, list_in_memory, read_classes, read_list, write_list
from utils.runs.checkpoint import LAST, load_checkpoint
from utils.runs.resume import find_runs
from utils.system.digests import digest
from utils.system.files import write_json

FOLDER = "cross_validation"
RESULTS = "cross_validation.json"


def cross_validate(config: TrainConfig, folds: int, group_regex: str, train: Callable[[TrainConfig], Any]) -> None:
    """Train once for each of `folds` parts of the training and validation images, validated on that part; print and
    write the mean and deviation of top-1. With `resume` at auto the same command goes on where it was cut off; each
    division of the images has a folder of its own.

    Args:
        config: the settings of each run; its lists together are divided anew.
        folds: how many, 2 or more.
        group_regex: as for txt_annotation.py: images of one patient, video or burst stay in one fold.
        train: makes a run of a config.

    Raises:
        ValueError: there are too few images, or groups of them, for so many folds; or `resume` is a run.
    """
    if config.resume not in ("auto", "no"):
        raise ValueError(f"resume={config.resume!r}: that is one run; cross_validate makes many, so give auto or no")
    ensure_lists(config)
    names = read_classes(config.classes_path)
    images = read_all(config, len(names))
    fold_of = assign_folds(images, folds, config, group_regex)
    division = digest([*names, images.buffer.tobytes(), fold_of.tobytes()])[:8]
    root = Path(config.save_dir, FOLDER, f"{folds}_folds_{division}")
    rows = []
    for fold in range(folds):
        print(f"fold {fold + 1} of {folds}: {(fold_of == fold).sum()} of {len(images)} images are validated on")
        of_fold = prepare_fold(config, images, fold_of == fold, root / f"fold_{fold + 1}")
        run = next(find_runs(of_fold, finished=True), None) if config.resume == "auto" else None
        if run is None:
            train(of_fold)
            run = next(find_runs(of_fold, finished=True))
        shutil.rmtree(of_fold.cache_dir, ignore_errors=True)  # of lists that nothing else has
        history = load_checkpoint(run / LAST)["history"]
        best = history[of_fold.best_epoch(history)]
        rows.append({"run": str(run), "last_top1": history[-1]["val_top1"], "best_top1": best["val_top1"]})
    write_json(root / RESULTS, {"folds": rows})
    print(format_folds(rows, chose_last=config.patience > 0 or config.head_init == "probe"))
    print(f"written to {root / RESULTS}")


def read_all(config: TrainConfig, num_classes: int) -> ImageList:
    """The training and validation images as one list, sorted by path."""
    lists = [read_list(path, num_classes) for path in (config.train_annotation_path, config.val_annotation_path)]
    entries = [(images.path(i), int(images.class_ids[i])) for images in lists for i in range(len(images))]
    # Not resolved: group_regex is for the names that links have.
    return list_in_memory((class_id, os.path.abspath(path)) for path, class_id in sorted(entries))


def assign_folds(images: ImageList, folds: int, config: TrainConfig, group_regex: str) -> np.ndarray:
    """The fold (n,) of each image, 0 to `folds` - 1: every class divided as evenly as its groups allow. Images that
    look alike, but for those that do by nature, or belong to one group by name, are in one fold.

    Raises:
        ValueError: a class has too few images, or groups of them.
    """
    from sklearn.model_selection import StratifiedGroupKFold  # slow to import

    paths = [images.path(i) for i in range(len(images))]
    groups = group_by_name(paths, group_regex)
    if not all(map(is_demo, paths)):
        cache = Fingerprints(Path(config.cache_dir, "fingerprints.sqlite"), config.max_pixels, config.allow_truncated)
        places = zip(paths, map(str, images.class_ids), cache.read(paths), strict=True)
        audited = [AuditedImage(path, "train", name, found) for path, name, found in places if not found.error]
        findings = list(find_duplicates(audited))
        groups += linked(findings)
        for finding in findings:
            if finding.kind == SIMILAR_BY_NATURE:
                print(f"warning: {finding.message}")
    unit_of = {path: number for number, unit in enumerate(join_groups(paths, groups)) for path in unit}
    units = np.array([unit_of[path] for path in paths])
    fewest = min(len(np.unique(units[images.class_ids == class_id])) for class_id in np.unique(images.class_ids))
    if not 2 <= folds <= fewest:
        raise ValueError(
            f"cross_validate={folds}: give 2 to {fewest}; the smallest class has {fewest} images, those that look "
            f"alike or belong together counted as one"
        )
    splitter = StratifiedGroupKFold(folds, shuffle=True, random_state=config.seed)
    fold_of = np.empty(len(images), np.int64)
    for fold, (_, validated) in enumerate(splitter.split(paths, images.class_ids, units)):
        fold_of[validated] = fold
    return fold_of


def prepare_fold(config: TrainConfig, images: ImageList, validated: np.ndarray, folder: Path) -> TrainConfig:
    """Write a fold's lists into its folder, and give the settings of its run, which has a cache of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    lists = {"train_annotation_path": folder / "train.txt", "val_annotation_path": folder / "val.txt"}
    for path, which in zip(lists.values(), (~validated, validated), strict=True):
        write_list(path, [(int(images.class_ids[i]), images.path(i)) for i in np.flatnonzero(which)])
    cache_dir = str(Path(config.cache_dir, FOLDER, digest([repr(config)]), *folder.parts[-2:]))
    return replace(
        config, save_dir=str(folder), cache_dir=cache_dir, **{field: str(path) for field, path in lists.items()}
    )


def format_folds(rows: list[dict[str, Any]], chose_last: bool) -> str:
    """Top-1 over the folds, as lines for people; `chose_last`: whether what came out of the last epoch depends on the
    images that it was validated on."""
    honest, chosen = "which these images didn't choose", "which they helped choose, so that it is a little too high"
    told = []
    for key, what in (
        ("last_top1", f"after the last epoch, {chosen if chose_last else honest}"),
        ("best_top1", f"at the best epoch, {chosen}"),
    ):
        values = np.array([row[key] for row in rows])
        each = ", ".join(f"{value:.1%}" for value in values)
        told.append(f"top-1 {values.mean():.1%} ± {values.std(ddof=1):.1%} ({each}) {what}")
    return "\n".join(told)
