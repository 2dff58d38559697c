"""Predictions and losses of each image, from which all metrics are computed."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, partial
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from utils.metrics.blocks import map_rows

if TYPE_CHECKING:
    from scipy.sparse import csr_array

ECE_BINS = 15
"""Bins of the expected calibration error, as in Guo et al., 2017."""
TOP = 5
"""The most probable classes of each image that are kept."""


@dataclass(frozen=True)
class Scores:
    """Predictions for N images.

    Only the logits have a value for each image and class; probabilities are computed from them a block at a time.

    Attributes:
        logits: (N, classes), divided by `temperature` before the softmax.
        temperature: of the probabilities.
        class_ids: (N,), the true classes.
        top: (N, up to `TOP`), the most probable classes, most probable first; ties go to the lower id.
        top_probabilities: (N, up to `TOP`), float64, their probabilities.
        true_probabilities: (N,), float64, the probabilities of the true classes.
        true_ranks: (N,), the ranks of the true classes, see `true_ranks`.
        losses: (N,), cross-entropy in nats.
        briers: (N,), the squared error of the probabilities, summed over the classes: 0 to 2 (Brier, 1950).
    """

    logits: Tensor
    temperature: float
    class_ids: np.ndarray
    top: np.ndarray
    top_probabilities: np.ndarray
    true_probabilities: np.ndarray
    true_ranks: np.ndarray
    losses: np.ndarray
    briers: np.ndarray

    @staticmethod
    def from_logits(logits: Tensor, class_ids: Tensor, temperature: float = 1.0) -> Scores:
        """Compute scores from logits (N, classes) / temperature and class ids (N,).

        Raises:
            ValueError: there are no images, or a logit isn't finite.
        """
        if not len(class_ids):
            raise ValueError("there are no images to evaluate")
        if num_bad := int((~finite_rows(logits)).sum()):
            raise ValueError(
                f"the network's outputs for {num_bad} of {len(logits)} images aren't finite; train it again"
            )
        score = partial(_score, temperature=temperature)
        per_image = map_rows(score, logits.shape[1], logits, class_ids)
        return Scores(logits, temperature, class_ids.numpy(), *(values.numpy() for values in per_image))

    def __len__(self) -> int:
        return len(self.class_ids)

    @property
    def num_classes(self) -> int:
        """Number of classes of the classifier, including those without images."""
        return self.logits.shape[1]

    @property
    def predicted(self) -> np.ndarray:
        """(N,), the most probable class."""
        return self.top[:, 0]

    @property
    def confidence(self) -> np.ndarray:
        """(N,), the probability of the predicted class."""
        return self.top_probabilities[:, 0]

    @cached_property
    def correct(self) -> np.ndarray:
        """(N,) bool, whether the prediction is correct."""
        return self.predicted == self.class_ids

    @cached_property
    def support(self) -> np.ndarray:
        """(classes,), the number of images of each class."""
        return np.bincount(self.class_ids, minlength=self.num_classes)

    @cached_property
    def present(self) -> np.ndarray:
        """The ids of the classes that have images."""
        return np.flatnonzero(self.support)

    @cached_property
    def present_probabilities(self) -> np.ndarray:
        """(N, present classes), float64: with few images of many classes, far smaller than the logits."""
        present = torch.from_numpy(self.present)

        def columns(logits: Tensor) -> tuple[Tensor]:
            return (_probabilities(logits, self.temperature)[:, present],)

        (probabilities,) = map_rows(columns, self.num_classes, self.logits)
        return probabilities.numpy()

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

    def bins(self) -> np.ndarray:
        """(N,), the index of the confidence among `ECE_BINS` bins of equal width; a bin includes its upper end."""
        return np.clip(np.ceil(self.confidence * ECE_BINS).astype(int) - 1, 0, ECE_BINS - 1)


def finite_rows(logits: Tensor) -> Tensor:
    """(N,) bool, whether all logits (N, classes) of a row are finite."""
    lowest, highest = logits.aminmax(dim=1)  # `logits.isfinite()` would copy them; NaN is both lowest and highest
    return lowest.isfinite() & highest.isfinite()


def true_ranks(values: Tensor, class_ids: Tensor) -> Tensor:
    """Ranks (N,) of the true classes, from 0, by logits or probabilities (N, classes); ties go to the lower id."""
    true_values = values.gather(1, class_ids[:, None])  # (N, 1)
    lower_id = torch.arange(values.shape[1]) < class_ids[:, None]  # (N, classes)
    return ((values > true_values) | ((values == true_values) & lower_id)).sum(dim=1)


def _score(logits: Tensor, class_ids: Tensor, temperature: float) -> tuple[Tensor, ...]:
    """The attributes of `Scores` from `top` on, for a block of images."""
    losses = F.cross_entropy(logits.double() / temperature, class_ids, reduction="none")
    probabilities = _probabilities(logits, temperature)
    ranks = true_ranks(probabilities, class_ids)
    true_probabilities = probabilities.gather(1, class_ids[:, None])[:, 0]
    squares = torch.from_numpy(np.einsum("nk,nk->n", probabilities.numpy(), probabilities.numpy()))  # without a copy
    top, top_probabilities = _pop_top(probabilities)
    return top, top_probabilities, true_probabilities, ranks, losses, squares - 2 * true_probabilities + 1


def _probabilities(logits: Tensor, temperature: float) -> Tensor:
    """The softmax of logits (N, classes) / temperature, float64."""
    return (logits.double() / temperature).softmax(dim=1)


def _pop_top(probabilities: Tensor) -> tuple[Tensor, Tensor]:
    """The `TOP` most probable classes and their probabilities, which are replaced by -1. Ties go to the lower id, which
    `Tensor.topk` doesn't promise."""
    ids, values = [], []
    for _ in range(min(TOP, probabilities.shape[1])):
        ids.append(probabilities.argmax(dim=1, keepdim=True))
        values.append(probabilities.gather(1, ids[-1]))
        probabilities.scatter_(1, ids[-1], -1)
    return torch.cat(ids, dim=1), torch.cat(values, dim=1)


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
