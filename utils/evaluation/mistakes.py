"""Selection of images to look at: mistakes, uncertain predictions, likely label errors; accuracy by image property."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from utils.data.image_io import ImageError, read_size
from utils.data.image_list import ImageList
from utils.metrics.intervals import Interval, wilson_interval
from utils.metrics.label_errors import find_label_errors
from utils.metrics.scores import Scores
from utils.system.thread_map import map_parallel


def worst_mistakes(scores: Scores, n: int) -> list[int]:
    """Indices of the `n` misclassified images with the highest loss, highest first."""
    wrong = np.flatnonzero(~scores.correct)
    return wrong[np.argsort(-scores.losses[wrong], kind="stable")][:n].tolist()


def margins(scores: Scores) -> np.ndarray:
    """The probability (N,) of the most likely class minus that of the second."""
    return scores.top_probabilities[:, 0] - scores.top_probabilities[:, 1]


def least_certain(scores: Scores, n: int) -> list[int]:
    """Indices of the `n` images with the smallest margin, correct or not, smallest first."""
    return np.argsort(margins(scores), kind="stable")[:n].tolist()


class ConfusedPair(NamedTuple):
    """Images of class id `truth` predicted as class id `predicted`, the most confident first."""

    truth: int
    predicted: int
    images: list[int]


def confused_pairs(scores: Scores) -> list[ConfusedPair]:
    """All pairs of true and predicted class that differ, the most frequent first."""
    pairs: dict[tuple[int, int], list[int]] = {}
    wrong = np.flatnonzero(~scores.correct)
    for i in wrong[np.argsort(-scores.confidence[wrong], kind="stable")].tolist():
        pairs.setdefault((int(scores.class_ids[i]), int(scores.predicted[i])), []).append(i)
    return [ConfusedPair(*pair, pairs[pair]) for pair in sorted(pairs, key=lambda pair: (-len(pairs[pair]), pair))]


def label_errors(scores: Scores) -> list[int]:
    """Indices of images whose label is likely wrong, the most likely first; not valid for training images."""
    return find_label_errors(np.searchsorted(scores.present, scores.class_ids), scores.present_probabilities)


def nearest(embeddings: Tensor, others: Tensor) -> list[int]:
    """For each of embeddings (n, C), the index of the most similar of `others` (m, C), by cosine similarity."""
    return (F.normalize(embeddings, dim=1) @ F.normalize(others, dim=1).T).argmax(dim=1).tolist()


class Slice(NamedTuple):
    """Accuracy, with its interval, of the `count` images whose value is between `low` and `high`."""

    low: float
    high: float
    count: int
    accuracy: float
    interval: Interval


def accuracy_by(values: np.ndarray, correct: np.ndarray) -> list[Slice]:
    """Accuracy by quartile of values (n,), without NaN. Equal values share a slice, so there may be fewer than four."""
    known = ~np.isnan(values)
    values, correct = values[known], correct[known]
    if not len(values):
        return []
    edges = np.unique(np.quantile(values, (0.25, 0.5, 0.75), method="higher"))
    quartile = np.searchsorted(edges, values, side="left")
    slices = []
    for q in np.unique(quartile):
        inside = quartile == q
        count, hits = int(inside.sum()), int(correct[inside].sum())
        low, high = values[inside].min(), values[inside].max()
        slices.append(Slice(float(low), float(high), count, hits / count, wilson_interval(hits, count)))
    return slices


def read_sizes(images: ImageList, max_pixels: int) -> np.ndarray:
    """Width and height (n, 2) in pixels from the image headers; NaN for unreadable images."""

    def size(path: str) -> tuple[float, float]:
        try:
            return read_size(path, max_pixels)
        except ImageError:
            return np.nan, np.nan

    paths = [images.path(i) for i in range(len(images))]
    return np.array(list(map_parallel(size, paths, "sizes")), dtype=float).reshape(-1, 2)
