"""Predictions and losses of each image, from which all metrics are computed."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from scipy.sparse import csr_array

ECE_BINS = 15
"""Bins of the expected calibration error, as in Guo et al., 2017."""


@dataclass(frozen=True)
class Scores:
    """Predictions for N images.

    Attributes:
        class_ids: (N,), the true classes.
        probabilities: (N, classes), float64.
        predicted: (N,), the most probable class; ties go to the lower id.
        losses: (N,), cross-entropy in nats.
    """

    class_ids: np.ndarray
    probabilities: np.ndarray
    predicted: np.ndarray
    losses: np.ndarray

    @staticmethod
    def from_logits(logits: Tensor, class_ids: Tensor, temperature: float = 1.0) -> Scores:
        """Compute scores from logits (N, classes) / temperature and class ids (N,).

        Raises:
            ValueError: there are no images, or a logit isn't finite.
        """
        if not len(class_ids):
            raise ValueError("there are no images to evaluate")
        if num_bad := int((~logits.isfinite().all(dim=1)).sum()):
            raise ValueError(
                f"the network's outputs for {num_bad} of {len(logits)} images aren't finite; train it again"
            )
        scaled = logits.to(torch.float64, copy=True).div_(temperature)  # large with many classes
        losses = F.cross_entropy(scaled, class_ids, reduction="none").numpy()
        probabilities = scaled.softmax(dim=1).numpy()
        return Scores(class_ids.numpy(), probabilities, probabilities.argmax(axis=1), losses)

    def __len__(self) -> int:
        return len(self.class_ids)

    @property
    def num_classes(self) -> int:
        """Number of classes of the classifier, including those without images."""
        return self.probabilities.shape[1]

    @cached_property
    def correct(self) -> np.ndarray:
        """(N,) bool, whether the prediction is correct."""
        return self.predicted == self.class_ids

    @cached_property
    def confidence(self) -> np.ndarray:
        """(N,), the probability of the predicted class."""
        return self.probabilities.max(axis=1)

    @cached_property
    def support(self) -> np.ndarray:
        """(classes,), the number of images of each class."""
        return np.bincount(self.class_ids, minlength=self.num_classes)

    @cached_property
    def predictions(self) -> np.ndarray:
        """(classes,), the number of images predicted as each class."""
        return np.bincount(self.predicted, minlength=self.num_classes)

    @cached_property
    def hits(self) -> np.ndarray:
        """(classes,), the number of images of each class that are classified correctly."""
        return np.bincount(self.class_ids[self.correct], minlength=self.num_classes)

    @cached_property
    def confusion(self) -> csr_array:
        """Counts (classes, classes), sparse: rows are true classes, columns predicted ones."""
        from scipy.sparse import coo_array  # slow to import

        ones, shape = np.ones(len(self), dtype=int), (self.num_classes, self.num_classes)
        return coo_array((ones, (self.class_ids, self.predicted)), shape=shape).tocsr()  # sums equal pairs

    @cached_property
    def briers(self) -> np.ndarray:
        """(N,), the squared error of the probabilities, summed over the classes: 0 to 2 (Brier, 1950)."""
        true_probabilities = self.probabilities[np.arange(len(self)), self.class_ids]
        squares = np.einsum("nk,nk->n", self.probabilities, self.probabilities)  # without a copy
        return squares - 2 * true_probabilities + 1

    def bins(self) -> np.ndarray:
        """(N,), the index of the confidence among `ECE_BINS` bins of equal width; a bin includes its upper end."""
        return np.clip(np.ceil(self.confidence * ECE_BINS).astype(int) - 1, 0, ECE_BINS - 1)


def reliability(scores: Scores) -> list[dict[str, float]]:
    """`count`, mean `confidence` and `accuracy` of each confidence bin that has images."""
    bins = scores.bins()
    counts = np.bincount(bins, minlength=ECE_BINS)
    confidence, hits = (np.bincount(bins, values, ECE_BINS) for values in (scores.confidence, scores.correct))
    return [
        {"count": int(counts[b]), "confidence": confidence[b] / counts[b], "accuracy": hits[b] / counts[b]}
        for b in np.flatnonzero(counts)
    ]


def expected_calibration_error(scores: Scores) -> float:
    """Expected calibration error (ECE): the gap between accuracy and confidence of a bin, averaged over the images."""
    return sum(row["count"] * abs(row["confidence"] - row["accuracy"]) for row in reliability(scores)) / len(scores)
