"""Which images to look at: those that were named wrong, hardly right, or whose label may be wrong."""

from __future__ import annotations

import warnings
from typing import NamedTuple

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from utils.data.image_io import ImageError, read_size
from utils.data.image_list import ImageList
from utils.metrics.intervals import Interval, wilson_interval
from utils.metrics.scores import Scores
from utils.system.thread_map import map_parallel


def worst_mistakes(scores: Scores, most: int) -> list[int]:
    """The images named wrong of highest loss, that first."""
    wrong = np.flatnonzero(~scores.correct)
    return wrong[np.argsort(-scores.losses[wrong], kind="stable")][:most].tolist()


def margins(scores: Scores) -> np.ndarray:
    """How much likelier (N,) the likeliest class is than the next, 0 to 1."""
    two = np.partition(scores.probabilities, -2, axis=1)[:, -2:]
    return two[:, 1] - two[:, 0]


def least_certain(scores: Scores, most: int) -> list[int]:
    """The images, right or wrong, of smallest margin, that first."""
    return np.argsort(margins(scores), kind="stable")[:most].tolist()


class ConfusedPair(NamedTuple):
    """One class taken for another.

    Attributes:
        truth: class id.
        predicted: class id.
        images: those it happened to, the most confident first.
    """

    truth: int
    predicted: int
    images: list[int]


def confused_pairs(scores: Scores) -> list[ConfusedPair]:
    """All pairs of a true and a predicted class that differ, the most frequent first."""
    pairs: dict[tuple[int, int], list[int]] = {}
    wrong = np.flatnonzero(~scores.correct)
    for i in wrong[np.argsort(-scores.confidence[wrong], kind="stable")].tolist():
        pairs.setdefault((int(scores.class_ids[i]), int(scores.predicted[i])), []).append(i)
    return [ConfusedPair(*pair, pairs[pair]) for pair in sorted(pairs, key=lambda pair: (-len(pairs[pair]), pair))]


def label_errors(scores: Scores) -> list[int]:
    """The images whose label is likely wrong, the likeliest first, by confident learning (Northcutt et al., 2021,
    https://arxiv.org/abs/1911.00068), which holds for images that weren't trained on."""
    if len(np.unique(scores.class_ids)) < 2:
        return []
    from cleanlab.filter import find_label_issues  # brings pandas

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of classes with fewer than five images
        found = find_label_issues(
            scores.class_ids,
            scores.probabilities,
            return_indices_ranked_by="self_confidence",
            n_jobs=1,
        )
    return [int(i) for i in found]


def nearest(embeddings: Tensor, others: Tensor) -> list[int]:
    """For each of embeddings (n, C) which of `others` (m, C) is the nearest, by the angle between them."""
    return (F.normalize(embeddings, dim=1) @ F.normalize(others, dim=1).T).argmax(dim=1).tolist()


class Slice(NamedTuple):
    """The images within a range of some quantity.

    Attributes:
        low: smallest value.
        high: largest value.
        count: how many images.
        accuracy: the part that is named right.
        interval: of the accuracy.
    """

    low: float
    high: float
    count: int
    accuracy: float
    interval: Interval


def accuracy_by(values: np.ndarray, correct: np.ndarray) -> list[Slice]:
    """Accuracy in up to four slices of about as many images, by values (n,); equal values stay together, and values
    that aren't known (NaN) are left out."""
    known = ~np.isnan(values)
    values, correct = values[known], correct[known]
    if not len(values):
        return []
    edges = np.unique(np.quantile(values, (0.25, 0.5, 0.75), method="higher"))
    part = np.searchsorted(edges, values, side="left")
    slices = []
    for p in np.unique(part):
        inside = part == p
        count, hits = int(inside.sum()), int(correct[inside].sum())
        low, high = values[inside].min(), values[inside].max()
        slices.append(Slice(float(low), float(high), count, hits / count, wilson_interval(hits, count)))
    return slices


def read_sizes(images: ImageList, max_pixels: int) -> np.ndarray:
    """Width and height (n, 2) of the images of a list in pixels, as their headers have them; NaN where they can't be
    read."""

    def size(path: str) -> tuple[float, float]:
        try:
            return read_size(path, max_pixels)
        except ImageError:
            return np.nan, np.nan

    paths = [images.path(i) for i in range(len(images))]
    return np.array(list(map_parallel(size, paths, "sizes")), dtype=float).reshape(-1, 2)
