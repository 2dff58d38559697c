"""The images to evaluate on: a list or a folder, OOD images, and their overlap with the run's own lists."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from utils.annotation.folder_scan import ClassesFrom, Scan, find_images, scan_classes, split_of
from utils.config.train_config import project_files
from utils.data.image_list import ImageList, list_in_memory, read_classes, read_list
from utils.inference.classifier import Classifier
from utils.runs.folder import is_run, list_path, read_run_list
from utils.system.text import shorten_list


def read_ood_images(classifier: Classifier, folder: str) -> ImageList:
    """The images in a folder and its subfolders, all of them out of distribution (OOD).

    Raises:
        FileNotFoundError: the folder does not exist.
        ValueError: it has no images, or the classifier can't reject.
    """
    if not Path(folder).is_dir():
        raise FileNotFoundError(f"ood={folder!r}: the folder does not exist")
    if not classifier.can_reject:
        raise ValueError(
            f"ood={folder!r}: this classifier can't reject; use the best checkpoint of a finished run, without raw"
        )
    paths = find_images(folder, skipped := Counter())
    _print_skipped(skipped, "ood")
    if not paths:
        raise ValueError(f"ood={folder!r}: the folder has no images")
    return list_in_memory((0, path) for path in paths)


def own_images(checkpoint: Path, classifier: Classifier) -> tuple[str, ImageList] | None:
    """The path and images of the test list of a checkpoint's run, or else of its validation list; None if it isn't in
    a run folder. A test list that was written after the run started is found at the path in its settings.

    Raises:
        FileNotFoundError: the images aren't in this working folder.
        ValueError: the list can't be read, or has other classes.
    """
    config, names = classifier.config, classifier.class_names
    if not is_run(checkpoint.parent):
        return None
    path = list_path(config, "test")
    images = read_run_list(checkpoint, config, names, "test")
    if images is None and Path(path).is_file():
        return path, read_images(path, "", names)
    if images is None:
        path, images = list_path(config, "val"), read_run_list(checkpoint, config, names, "val")
        if config.get("refit_head"):
            print(f"warning: the head was fitted to the images of {path}, too: results on new images will be worse")
    if not os.path.exists(images.path(0)):
        raise FileNotFoundError(
            f"data: {images.path(0)}, the first image of the run's list, isn't in this working folder; run eval.py in "
            f"the folder where the run was trained, or give a list or a folder of images with --data"
        )
    if Path(path).is_file() and Path(path).read_bytes() != images.buffer.tobytes():
        print(f"{path} has changed since the run started; to evaluate on it as it is now: --data {path}")
    return path, images


def read_images(data: str, classes_path: str, class_names: list[str]) -> ImageList:
    """The images of a list, or of a folder with one subfolder per class, checked against the checkpoint's classes.

    `classes_path` is the class file of a list; empty: that of the list's project, if it has one.

    Raises:
        FileNotFoundError: the list or folder, or a class file that was given, does not exist.
        ValueError: the classes differ, or the list can't be read.
    """
    if not Path(data).exists():
        raise FileNotFoundError(f"data: there is no list or folder {data}; python txt_annotation.py writes lists")
    if Path(data).is_dir():
        return list_folder(data, class_names)
    folder = os.path.dirname(data)
    of_project = project_files(folder)["classes_path"]
    if classes_path or Path(of_project).is_file():
        check_classes(read_classes(classes_path or of_project), class_names, classes_path or of_project)
    return read_list(data, len(class_names))


@dataclass(frozen=True)
class Overlap:
    """How many of the evaluated images the checkpoint's run has used.

    Attributes:
        images: number of evaluated images.
        trained_on: how many of them are in the run's training list.
        validated_on: how many of them are in its validation list.
        known: whether both counts are complete: the lists are beside the checkpoint, and all their images exist.
    """

    images: int
    trained_on: int
    validated_on: int
    known: bool

    @property
    def notes(self) -> list[str]:
        """Warnings for readers of metrics on these images."""
        notes = []
        if self.trained_on:
            notes.append(
                f"{self.trained_on} of the {self.images} images were trained on: results on new images will be worse"
            )
        if self.validated_on:
            notes.append(
                f"{self.validated_on} of the {self.images} images are in the validation list, which selected the best "
                f"epoch, the temperature and the thresholds: results on new images will be slightly worse"
            )
        if not self.known:
            notes.append(
                f"It is unknown whether {'more of ' if notes else ''}these images were trained on: the run's lists are "
                f"not beside the checkpoint, or their images were moved or deleted. If they were, results on new "
                f"images will be worse"
            )
        return notes


def count_overlap(checkpoint: Path, classifier: Classifier, images: ImageList) -> Overlap:
    """How many of `images` are in the lists of the checkpoint's run, compared by resolved path."""
    places = Counter(os.path.realpath(images.path(i)) for i in range(len(images)))
    counts, known = {"train": 0, "val": 0}, True
    for key in counts:
        try:
            of_run = read_run_list(checkpoint, classifier.config, classifier.class_names, key)
        except ValueError:  # not a list of this run
            of_run = None
        paths = [of_run.path(i) for i in range(len(of_run))] if of_run else []
        counts[key] = sum(places[place] for place in set(map(os.path.realpath, paths)))
        known = known and bool(paths) and all(map(os.path.exists, paths))
    if classifier.config.get("refit_head"):
        counts = {"train": sum(counts.values()), "val": 0}
    return Overlap(len(images), counts["train"], counts["val"], known)


def list_folder(folder: str, class_names: list[str]) -> ImageList:
    """The images in the class folders of `folder`, which are the top ones, the innermost ones, or the whole paths,
    whichever the checkpoint knows; prints what is skipped.

    Raises:
        ValueError: a subfolder is not a class of the checkpoint, or there are no images.
    """
    scan = _scan_test(folder, "top")
    images = scan.images["test"]
    if all(split_of(name) and name not in class_names for name in images):
        such_as = f", such as {folder}/test" if Path(folder, "test").is_dir() else ""
        raise ValueError(f"{folder} contains no folders named after classes; give the one that does{such_as}")
    if not images.keys() <= set(class_names):
        others = (_scan_test(folder, "leaf"), _scan_test(folder, "path"))
        scan = next((other for other in others if other.images["test"].keys() <= set(class_names)), scan)
        images = scan.images["test"]
    check_classes(list(images), class_names, folder, subset=True)
    for name, reasons in scan.skipped.items():
        _print_skipped(reasons, name)
    return list_in_memory(
        (class_id, path) for class_id, name in enumerate(class_names) for path in images.get(name, ())
    )


def _scan_test(folder: str, classes_from: ClassesFrom) -> Scan:
    scan = Scan()
    scan_classes(Path(folder), scan, "test", classes_from)
    return scan


def _print_skipped(reasons: Counter[str], source: str) -> None:
    for reason, count in reasons.items():
        print(f"skipped: {count} {reason}{f' ({source})' if source else ''}")


def check_classes(names: list[str], class_names: list[str], source: str, subset: bool = False) -> None:
    """Raise a ValueError unless `names`, from `source`, are the checkpoint's classes in order, or a subset of them."""
    extra = sorted(set(names) - set(class_names))
    missing = [] if subset else sorted(set(class_names) - set(names))
    reordered = not subset and not extra and not missing and names != class_names
    if extra or missing or reordered:
        parts = [f"only in {source}: {shorten_list(extra)}"] if extra else []
        parts += [f"only in the checkpoint: {shorten_list(missing)}"] if missing else []
        raise ValueError(
            f"the classes of {source} differ from the checkpoint's "
            f"({'the same in another order' if reordered else '; '.join(parts)}); rename them, or use the data or the "
            f"checkpoint that matches"
        )
