"""What the probabilities say of each image, and so what all metrics are made of."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch.nn.functional as F
from torch import Tensor

ECE_BINS = 15
"""Bins of the expected calibration error: 15, as Guo et al., 2017, have it."""


@dataclass(frozen=True)
class Scores:
    """N images and what was said of them.

    Attributes:
        class_ids: (N,), the truth.
        probabilities: (N, classes), float64.
        predicted: (N,), the likeliest class; of equal ones the lower id.
        losses: (N,), cross-entropy in nats.
    """

    class_ids: np.ndarray
    probabilities: np.ndarray
    predicted: np.ndarray
    losses: np.ndarray

    @staticmethod
    def of(logits: Tensor, class_ids: Tensor, temperature: float = 1.0) -> Scores:
        """From logits (N, classes), class ids (N,), and what the logits are divided by.

        Raises:
            ValueError: there are no images, or a logit isn't finite.
        """
        if not len(class_ids):
            raise ValueError("there are no images to evaluate")
        bad = int((~logits.isfinite().all(dim=1)).sum())
        if bad:
            raise ValueError(f"the network's outputs for {bad} of {len(logits)} images aren't finite; train it anew")
        scaled = logits.double() / temperature
        probabilities = scaled.softmax(dim=1).numpy()
        return Scores(
            class_ids.numpy(),
            probabilities,
            probabilities.argmax(axis=1),
            F.cross_entropy(scaled, class_ids, reduction="none").numpy(),
        )

    def __len__(self) -> int:
        return len(self.class_ids)

    @property
    def num_classes(self) -> int:
        """Classes of the classifier, with images or without."""
        return self.probabilities.shape[1]

    @cached_property
    def correct(self) -> np.ndarray:
        """(N,) bool."""
        return self.predicted == self.class_ids

    @cached_property
    def confidence(self) -> np.ndarray:
        """(N,), the probability of the predicted class."""
        return self.probabilities.max(axis=1)

    @cached_property
    def support(self) -> np.ndarray:
        """(classes,), the images of each."""
        return np.bincount(self.class_ids, minlength=self.num_classes)

    @cached_property
    def confusion(self) -> np.ndarray:
        """Counts (classes, classes): row the true class, column the predicted one."""
        from sklearn.metrics import confusion_matrix  # slow to import, and predicting goes without

        return confusion_matrix(self.class_ids, self.predicted, labels=range(self.num_classes))

    @cached_property
    def briers(self) -> np.ndarray:
        """(N,), the squared error of the probabilities, summed over the classes: 0 to 2 (Brier, 1950)."""
        of_truth = self.probabilities[np.arange(len(self)), self.class_ids]
        return (self.probabilities**2).sum(axis=1) - 2 * of_truth + 1

    def bins(self) -> np.ndarray:
        """(N,), which of `ECE_BINS` bins of equal width, open below and closed above, the confidence falls into."""
        return np.clip(np.ceil(self.confidence * ECE_BINS).astype(int) - 1, 0, ECE_BINS - 1)


def reliability(scores: Scores) -> list[dict[str, float]]:
    """For each bin of confidence that has images: `count`, mean `confidence`, and `accuracy`."""
    bins = scores.bins()
    counts = np.bincount(bins, minlength=ECE_BINS)
    confidence, hits = (np.bincount(bins, values, ECE_BINS) for values in (scores.confidence, scores.correct))
    return [
        {"count": int(counts[b]), "confidence": confidence[b] / counts[b], "accuracy": hits[b] / counts[b]}
        for b in np.flatnonzero(counts)
    ]


def expected_calibration_error(scores: Scores) -> float:
    """The mean gap, over the images, between the accuracy and the mean confidence of their bin (ECE)."""
    return sum(row["count"] * abs(row["confidence"] - row["accuracy"]) for row in reliability(scores)) / len(scores)
