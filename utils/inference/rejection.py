"""Decide which predictions to reject: those of low probability, and those of out-of-distribution (OOD) images.

Everything is fitted after training, on the validation images and on embeddings (the input of the network's head) of
training images, and stored in the checkpoint.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from utils.metrics.blocks import map_rows
from utils.metrics.temperature import fit_temperature

UNKNOWN = "unknown"
"""The label of a rejected prediction."""

DISTANCE_QUANTILE = 0.95
"""The quantile of the validation images' distances beyond which an image counts as OOD. About 5 % of the images
of a class are rejected by it."""

TEMPERATURES = ("temperature", "tta_temperature")
OPTIONAL = ("true_probability", "tta_temperature")
"""Attributes of a `Calibration` that earlier versions didn't fit."""


@dataclass(frozen=True)
class Calibration:
    """The values fitted after training.

    Attributes:
        temperature: logits are divided by it.
        centre: (C,), the mean of the classes' mean embeddings.
        whitening: (C, C), makes deviations from the class means uncorrelated with variance 1.
        directions: (classes with training images, C), whitened unit vectors from the center to the class means.
        probability: (n,), of the predicted class of each validation image.
        correct: (n,) bool, whether that class is the true one.
        distance: (n,), to the nearest class in degrees, see `distances`.
        true_probability: (n,), of the true class of each; None: fitted by an earlier version.
        tta_temperature: logits averaged over TTA views are divided by it; None: fitted by an earlier version.
    """

    temperature: float
    centre: Tensor
    whitening: Tensor
    directions: Tensor
    probability: Tensor
    correct: Tensor
    distance: Tensor
    true_probability: Tensor | None = None
    tta_temperature: float | None = None

    def as_dict(self) -> dict[str, Any]:
        """The attributes, for a checkpoint."""
        return dict(vars(self))

    @staticmethod
    def from_dict(values: dict[str, Any]) -> Calibration | None:
        """The inverse of `as_dict`; None for {}, which the checkpoints of an unfinished run contain.

        Raises:
            TypeError: a value is invalid.
        """
        if not values:
            return None
        attributes = {field.name: values.get(field.name) for field in fields(Calibration)}
        attributes = {name: value for name, value in attributes.items() if value is not None or name not in OPTIONAL}
        if not all(_is_valid(name, value) for name, value in attributes.items()):
            raise TypeError("invalid calibration")
        center, whitening, directions, *per_image = (v for v in attributes.values() if isinstance(v, Tensor))
        c = center.numel()
        consistent = (center.shape, whitening.shape, directions.shape[1:]) == ((c,), (c, c), (c,))
        if not consistent or not len(directions) or {t.shape for t in per_image} != {(len(per_image[0]),)}:
            raise TypeError("invalid calibration: its tensors have inconsistent shapes")
        return Calibration(**attributes)

    def distances(self, embeddings: Tensor) -> Tensor:
        """Distances (B,) of embeddings (B, C) to the nearest class, in degrees from 0 to 180.

        The distance is the angle at the center between the embedding and the class mean, after whitening with one
        covariance for all classes, as in Lee et al., 2018, https://arxiv.org/abs/1807.03888. Their Mahalanobis
        distance separates images of other classes of the same kind poorly: these lie near the center, no farther from
        the class means than images of the classes do. Scores are compared in docs/benchmarks.md.
        """
        whitened = F.normalize((embeddings.float() - self.centre) @ self.whitening, dim=1)

        def highest(block: Tensor) -> tuple[Tensor]:
            return ((block @ self.directions.T).amax(dim=1),)

        (cosines,) = map_rows(highest, len(self.directions), whitened)
        return cosines.clamp(-1, 1).acos().rad2deg()

    @property
    def max_distance(self) -> float:
        """The distance beyond which an image counts as OOD."""
        return self.distance.quantile(DISTANCE_QUANTILE).item() if len(self.distance) else math.inf

    def choose_rejection(self, max_error: float) -> Rejection:
        """Choose the lowest probability to accept for an error rate of at most `max_error`, 0 to 1.

        The error rate is that of the accepted validation images; those that are too far from all classes are rejected
        in any case.
        """
        near = self.distance <= self.max_distance
        order = self.probability[near].argsort(descending=True)
        probability, correct = self.probability[near][order], self.correct[near][order]
        errors = (~correct).cumsum(0) / torch.arange(1, len(correct) + 1)
        # Images of equal probability can only be accepted together.
        last_of_equal = torch.cat([probability[1:] < probability[:-1], torch.ones(1, dtype=torch.bool)])
        allowed = torch.nonzero((errors <= max_error) & last_of_equal[: len(errors)]).flatten()
        least = probability[allowed[-1]].item() if len(allowed) else math.inf
        return Rejection(least, self.max_distance)


@dataclass(frozen=True)
class Rejection:
    """Which predictions are rejected.

    Attributes:
        min_probability: the lowest probability that is accepted; infinite: none is.
        max_distance: the largest distance to the nearest class, in degrees, that is accepted; infinite: all are.
    """

    min_probability: float
    max_distance: float = math.inf

    def accepts(self, probability: Tensor, distance: Tensor) -> Tensor:
        """Bool (n,), for probabilities and distances (n,)."""
        return (probability >= self.min_probability) & (distance <= self.max_distance)

    def reason(self, probability: float, distance: float) -> str:
        """Why a prediction is rejected; empty if it isn't."""
        if distance > self.max_distance:
            return (
                f"unlike all classes: {distance:.0f}° from the nearest class; {DISTANCE_QUANTILE:.0%} of the "
                f"validation images are within {self.max_distance:.0f}°"
            )
        if probability < self.min_probability:
            least = "every threshold" if math.isinf(self.min_probability) else f"{self.min_probability:.1%}"
            return f"low probability: {probability:.1%} is below {least}"
        return ""

    def format_cost(self, calibration: Calibration) -> str:
        """A sentence on how many validation images are accepted, and how many of those are wrong."""
        n = len(calibration.correct)
        accepted = self.accepts(calibration.probability, calibration.distance)
        count, wrong = int(accepted.sum()), int((accepted & ~calibration.correct).sum())
        if not count:
            return f"none of the {n} validation images is accepted: no threshold has so few errors"
        return (
            f"of {n} validation images {count / n:.1%} are accepted, {wrong / count:.1%} of them wrong; expect a few "
            f"more errors on new images, since the threshold was chosen on these; eval.py measures it on test images"
        )


def fit_calibration(
    logits: Tensor, embeddings: Tensor, class_ids: Tensor, train_embeddings: Tensor, train_class_ids: Tensor
) -> Calibration:
    """Fit a calibration to validation images and, for the distances, to training images.

    Shapes: (n, classes), (n, C), (n,) of the validation images; (m, C), (m,) of training images, preprocessed as in
    evaluation.
    """
    temperature = fit_temperature(logits, class_ids)
    distance = _fit_distance(train_embeddings, train_class_ids)
    probability, predicted = most_probable(logits, temperature)
    true_probability = probability_of(class_ids, logits, temperature)
    fitted = Calibration(temperature, *distance, probability, predicted == class_ids, torch.zeros(0), true_probability)
    return Calibration(**(fitted.as_dict() | {"distance": fitted.distances(embeddings)}))


def _is_valid(name: str, value: Any) -> bool:
    """Whether an attribute of a `Calibration` has the type and range of its name."""
    if name in TEMPERATURES:
        return isinstance(value, float) and 1e-6 < value < 1e6
    dtype = torch.bool if name == "correct" else torch.float32
    return isinstance(value, Tensor) and value.dtype == dtype and bool(value.isfinite().all())


def most_probable(logits: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Probability and id of the most probable class, each (N,), by logits (N, classes) / temperature."""

    def highest(block: Tensor) -> tuple[Tensor, Tensor]:
        return (block / temperature).softmax(dim=1).max(dim=1)

    probability, predicted = map_rows(highest, logits.shape[1], logits)
    return probability, predicted


def probability_of(class_ids: Tensor, logits: Tensor, temperature: float) -> Tensor:
    """The probability (N,) of a class of each image, by logits (N, classes) / temperature."""

    def chosen(block: Tensor, ids: Tensor) -> tuple[Tensor]:
        return ((block / temperature).softmax(dim=1).gather(1, ids[:, None])[:, 0],)

    (probability,) = map_rows(chosen, logits.shape[1], logits, class_ids)
    return probability


def _fit_distance(embeddings: Tensor, class_ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Center, whitening and directions, see `Calibration`, of embeddings (m, C).

    The covariance is shrunk as by Ledoit and Wolf, since there may be fewer images than dimensions.
    """
    from sklearn.covariance import ledoit_wolf  # slow to import, and prediction doesn't need it

    present, rows = class_ids.unique(return_inverse=True)
    x = embeddings.double()
    means = torch.zeros(len(present), x.shape[1], dtype=x.dtype).index_add(0, rows, x)
    means /= rows.bincount()[:, None]
    covariance = torch.from_numpy(ledoit_wolf((x - means[rows]).numpy(), assume_centered=True)[0])
    variances, axes = torch.linalg.eigh(covariance)
    whitening = axes / variances.clamp_min(max(1e-6 * variances.max().item(), 1e-12)).sqrt()
    center = means.mean(dim=0)
    return center.float(), whitening.float(), F.normalize((means - center) @ whitening, dim=1).float()
