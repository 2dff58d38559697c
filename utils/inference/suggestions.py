"""Which images to label next: those that a classifier is least certain about."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from utils.annotation.fingerprint_table import Fingerprint, FingerprintTable
from utils.annotation.fingerprints import take_fingerprint
from utils.annotation.near_duplicates import near_duplicate_groups
from utils.data.image_io import ImageError
from utils.data.preprocessing import Preprocessing
from utils.inference.classifier import Classifier
from utils.inference.prediction import Failure, Prediction
from utils.runs.folder import LIST_FILES, read_run_list
from utils.system.thread_map import map_parallel

CANDIDATES = 10
"""The least certain images, per suggested one, among which near-duplicates are looked for: only these are held in
memory, in less than a kilobyte each, and read twice."""


def margin(prediction: Prediction) -> float:
    """The probability of the most probable class minus that of the second: small if the classifier is uncertain."""
    (_, first), (_, second), *_ = prediction.classes
    return first - second


def suggest(
    classifier: Classifier, images: Iterable[str], count: int, report: Callable[[Failure], object]
) -> list[Prediction]:
    """The images to label next, by `margin` (Scheffer et al., 2001, https://doi.org/10.1007/3-540-44816-0_31), the
    smallest first. Among near-duplicates, only the first is suggested, so there may be fewer than `count`.

    Groups of similar embeddings (Zhdanov, 2019, https://arxiv.org/abs/1901.05954) and BADGE (Ash et al., 2020,
    https://arxiv.org/abs/1906.03671) were not better, see `benchmarks/suggest_labels.py`.

    Args:
        classifier: has two classes or more.
        images: paths, read as they are needed.
        count: 1 or more.
        report: called with each image that has no prediction.
    """

    def predicted() -> Iterator[Prediction]:
        for result in classifier.stream(images, top_k=2):
            if isinstance(result, Failure):
                report(result)
            else:
                yield result

    candidates = heapq.nsmallest(CANDIDATES * count, predicted(), key=margin)
    return drop_near_duplicates(candidates, classifier.preprocessing)[:count]


def drop_near_duplicates(images: Sequence[Prediction], preprocessing: Preprocessing) -> list[Prediction]:
    """The images without those that are near-duplicates of an earlier one, as in the audit of folders, or that can't be
    read any more."""

    def fingerprint(image: Prediction) -> Fingerprint:
        try:
            return take_fingerprint(image.path, preprocessing.max_pixels, preprocessing.allow_truncated)
        except ImageError as error:
            return Fingerprint(error=str(error))

    prints = FingerprintTable.of(map_parallel(fingerprint, images, "comparing images"))
    readable = prints.readable()
    _, first = np.unique(prints.rows["digest"][readable], axis=0, return_index=True)  # blank ones have no details
    distinct = readable[np.sort(first)]
    repeated = {i for group in near_duplicate_groups(prints, distinct) for i in group[1:]}
    return [images[i] for i in distinct.tolist() if i not in repeated]


def labeled_images(checkpoint: Path, classifier: Classifier) -> Iterator[str]:
    """The paths in the lists of a checkpoint's run, as far as they are beside it."""
    for key in LIST_FILES:
        try:
            of_run = read_run_list(checkpoint, classifier.config, classifier.class_names, key)
        except ValueError:  # not a list of this run
            continue
        yield from (of_run.path(i) for i in range(len(of_run))) if of_run else ()
