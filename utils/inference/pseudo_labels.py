"""Adds unlabeled images to the training list, with the classes that a teacher predicts for them."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
from tqdm import tqdm

from nets.weights.digest import digest_file
from utils.annotation.folder_scan import find_images
from utils.config.train_config import TrainConfig
from utils.data.cache_file import describe_files
from utils.data.image_list import ImageList, list_in_memory, parse_list, read_list, write_list
from utils.inference.classifier import Classifier, load_classifier
from utils.inference.image_paths import drop_copies
from utils.inference.prediction import Failure
from utils.runs.teacher import check_teacher_classes, find_teacher
from utils.system.digests import digest
from utils.system.files import make_folder
from utils.system.runtime import runtime
from utils.system.text import count_of, shorten_list
from utils.training.datasets import Data

MAX_ERROR = 0.05
"""Error rate of the accepted validation images of the teacher, which chooses the threshold."""


def add_unlabeled(config: TrainConfig, data: Data) -> Data:
    """`data` with the images of the folder `unlabeled` in the training list, if there is one: those for which the
    teacher accepts its prediction, with the predicted class.

    This is self-training (Lee, "Pseudo-Label", 2013); the threshold comes from the teacher's validation images, as for
    `predict.py --reject-below auto`. Copies of listed images are excluded. The predictions are kept in `cache_dir`: a
    resumed run has the same list if the folder is unchanged.

    Raises:
        FileNotFoundError: there is no such folder or teacher.
        ValueError: there is no calibrated teacher, it has other classes, or the folder has no images.
    """
    if not config.unlabeled:
        return data
    where = f"unlabeled={config.unlabeled!r}"
    if not config.distill_from:
        raise ValueError(f"{where}: set distill_from to a run that predicts the classes of these images")
    if not Path(config.unlabeled).is_dir():
        raise FileNotFoundError(f"{where}: there is no such folder")
    lists = [data.val_images, data.train_images, *_test_images(config, data)]
    listed = (images.path(i) for images in lists for i in range(len(images)))
    skipped: Counter[str] = Counter()
    paths = drop_copies([os.path.abspath(path) for path in find_images(config.unlabeled, skipped)], listed)
    for reason, count in skipped.items():
        print(f"skipped in {config.unlabeled}: {count} {reason}")
    if not paths:
        raise ValueError(f"{where}: it has no images besides those of the lists")
    images = list_in_memory((0, path) for path in paths)
    teacher = find_teacher(config)
    name = digest([digest_file(teacher), *data.class_names, *describe_files(images, ())])
    file = Path(config.cache_dir, f"pseudo-labels-{name}.txt")
    runtime.first(lambda: file.is_file() or write_predicted(file, teacher, paths, config, data.class_names))
    if not file.is_file():
        raise ValueError(f"cache_dir={config.cache_dir!r}: all machines need the same folder; it lacks {file.name}")
    labeled = read_list(file, len(data.class_names)) if file.stat().st_size else list_in_memory([])
    counts = np.bincount(labeled.class_ids, minlength=len(data.class_names))
    per_class = [f"{name} {count}" for name, count in zip(data.class_names, counts, strict=True)]
    print(
        f"unlabeled: {count_of(len(paths), 'image')} in {config.unlabeled}, {len(labeled)} trained on with their "
        f"predicted classes ({shorten_list(per_class, 20)}); the list is {file}"
    )
    return data._replace(train_images=append(data.train_images, labeled))


def write_predicted(file: Path, teacher: Path, paths: list[str], config: TrainConfig, class_names: list[str]) -> None:
    """Write the list of the images whose prediction is accepted."""
    make_folder(config.cache_dir)
    classifier = load_classifier(teacher, config.device)
    check_teacher_classes(config, classifier.class_names, class_names)
    write_list(file, predict_classes(classifier, paths, class_names))


def predict_classes(classifier: Classifier, paths: list[str], class_names: list[str]) -> Iterator[tuple[int, str]]:
    """Class id in `class_names` and path of each image whose prediction is accepted."""
    if classifier.calibration is None:
        raise ValueError(
            "distill_from: unlabeled images need a calibrated teacher, the best checkpoint of a finished run"
        )
    rejection = classifier.calibration.choose_rejection(MAX_ERROR)
    results = classifier.stream(paths, top_k=1, rejection=rejection)
    for result in tqdm(results, "unlabeled images", len(paths), unit="image", leave=False, disable=None):
        if isinstance(result, Failure):
            print(f"warning: {result.error}")
        elif not result.rejected and result.label in class_names:
            yield class_names.index(result.label), result.path


def append(images: ImageList, more: ImageList) -> ImageList:
    """A list of both; `more` has absolute paths."""
    newline = [] if images.buffer[-1:].tobytes() in (b"", b"\n") else [np.frombuffer(b"\n", np.uint8)]
    buffer = np.concatenate([images.buffer, *newline, more.buffer])
    return replace(parse_list(buffer, "the training list with unlabeled images"), folder=images.folder)


def _test_images(config: TrainConfig, data: Data) -> list[ImageList]:
    path = config.test_annotation_path
    return [read_list(path, len(data.class_names))] if Path(path).is_file() else []
