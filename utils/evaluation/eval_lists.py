"""What a classifier is evaluated on: a list or a folder, of its classes; images of none of them; and which of all
these its run has seen."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from utils.annotation.folder_scan import SPLIT_NAMES, Scan, exclude_demo, find_images, scan_classes
from utils.config.train_config import TrainConfig
from utils.data.image_list import ImageList, list_in_memory, read_classes, read_list
from utils.inference.classifier import Classifier
from utils.runs.folder import LIST_FILES, read_run_list


def read_ood_images(classifier: Classifier, folder: str) -> ImageList:
    """The images in a folder and below, which are of no class.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: there are no images in it, or the classifier rejects nothing.
    """
    if not Path(folder).is_dir():
        raise FileNotFoundError(f"ood={folder!r}: there is no such folder")
    if not classifier.can_reject:
        raise ValueError(
            "ood: this classifier rejects nothing; take the best checkpoint of a finished run, and leave raw off"
        )
    paths = find_images(folder, skipped := Counter())
    for reason, count in skipped.items():
        print(f"passed over: {count} {reason} (ood)")
    if not paths:
        raise ValueError(f"ood={folder!r}: there are no images in it")
    return list_in_memory((0, path) for path in paths)


def read_images(data: str, classes_path: str, class_names: list[str]) -> ImageList:
    """The images of a list, or in a folder of class folders, whose classes are those of the checkpoint.

    Raises:
        FileNotFoundError: there is no such list or folder, or no class file where one was named.
        ValueError: the classes are others, or the list can't be read.
    """
    if not Path(data).exists():
        raise FileNotFoundError(f"there is no list or folder {data}; a list is written by python txt_annotation.py")
    if Path(data).is_dir():
        return list_folder(data, class_names)
    if Path(classes_path).is_file() or classes_path not in ("", TrainConfig.classes_path):
        check_classes(read_classes(classes_path), class_names, classes_path)
    return read_list(data, len(class_names))


@dataclass(frozen=True)
class Seen:
    """How many of the images that a checkpoint is evaluated on its run has seen.

    Attributes:
        images: how many there are.
        trained_on: how many of them are in the training list that the run began with.
        validated_on: likewise in its validation list.
        known: whether that is all: the lists are beside the checkpoint, and all their images where they say.
    """

    images: int
    trained_on: int
    validated_on: int
    known: bool

    @property
    def notes(self) -> list[str]:
        """What a reader of figures on these images should know first."""
        told = []
        if self.trained_on:
            told.append(
                f"{self.trained_on} of the {self.images} images were trained on: with new images the figures "
                f"would be worse"
            )
        if self.validated_on:
            told.append(
                f"{self.validated_on} of the {self.images} images are of the validation list, by which the run "
                f"chose its best epoch and more (temperature, thresholds, a probe's penalty): new images would do a "
                f"little worse"
            )
        if not self.known:
            told.append(
                f"Whether the run has seen {'others of ' if told else ''}these images can't be told: its lists "
                f"aren't beside the checkpoint, or images that they name are elsewhere or gone. If it has, new "
                f"images would do worse"
            )
        return told


def count_seen(checkpoint: Path, classifier: Classifier, images: ImageList) -> Seen:
    """How many of `images` the run of a checkpoint has seen, going by the paths, as far as its folder tells."""
    places = Counter(os.path.realpath(images.path(i)) for i in range(len(images)))
    counts, known = dict.fromkeys(LIST_FILES, 0), True
    for key in LIST_FILES:
        try:
            of_run = read_run_list(checkpoint, classifier.config, classifier.class_names, key)
        except ValueError:  # a list of something else
            of_run = None
        paths = [of_run.path(i) for i in range(len(of_run))] if of_run else []
        counts[key] = sum(places[place] for place in set(map(os.path.realpath, paths)))
        known = known and bool(paths) and all(map(os.path.exists, paths))
    return Seen(len(images), counts["train"], counts["val"], known)


def list_folder(folder: str, class_names: list[str]) -> ImageList:
    """The images in `folder`, whose folders are named after classes; what is passed over is printed.

    Raises:
        ValueError: it has a folder that is no class of the checkpoint, or no images.
    """
    scan = Scan()
    scan_classes(Path(folder), scan, "test")
    exclude_demo(scan)
    images = scan.images["test"]
    if images.keys() <= SPLIT_NAMES.keys() - set(class_names):
        such_as = f", such as {folder}/test" if Path(folder, "test").is_dir() else ""
        raise ValueError(f"{folder} has no folders of images named after classes; give the one that has{such_as}")
    check_classes(list(images), class_names, folder, may_lack=True)
    for name, reasons in scan.skipped.items():
        for reason, count in reasons.items():
            print(f"passed over: {count} {reason}{f' ({name})' if name else ''}")
    return list_in_memory(
        (class_id, path) for class_id, name in enumerate(class_names) for path in images.get(name, ())
    )


def check_classes(names: list[str], class_names: list[str], source: str, may_lack: bool = False) -> None:
    """Raise a ValueError that names the difference, unless `names`, from `source`, are the checkpoint's classes."""
    extra = sorted(set(names) - set(class_names))
    lacking = [] if may_lack else sorted(set(class_names) - set(names))
    moved = not may_lack and not extra and not lacking and names != class_names
    if extra or lacking or moved:
        told = [f"only in {source}: {', '.join(extra)}"] if extra else []
        told += [f"only in the checkpoint: {', '.join(lacking)}"] if lacking else []
        raise ValueError(
            f"{source} has other classes than the checkpoint was trained on ("
            f"{'the same in another order' if moved else '; '.join(told)}); rename them, or give the data or the "
            f"checkpoint that goes with it"
        )
