"""Whether an answer can be believed: probabilities that mean what they say, and images that are of no class.

All of it is fitted after training, on the validation images and on the embeddings of training images, and stored in
the checkpoint. An embedding is what the network's head takes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from utils.metrics.temperature import fit_temperature

UNKNOWN = "unknown"
"""The label of an image whose answer is rejected."""

FAR = 0.95
"""The part of the validation images that is near enough to a class. The rest is the price of rejecting others."""


@dataclass(frozen=True)
class Calibration:
    """What the validation images told of a network.

    Attributes:
        temperature: what its logits are divided by.
        centre: (C,), the mean of the classes' mean embeddings.
        whitening: (C, C), makes the deviations of embeddings from their class's mean uncorrelated and of variance 1.
        directions: (classes with training images, C), from the centre to the mean of each class, whitened, of length
            1.
        probability: (n,) of each validation image's likeliest class.
        correct: (n,) bool, whether that was its class.
        distance: (n,) to the nearest class, in degrees, see `distances`.
    """

    temperature: float
    centre: Tensor
    whitening: Tensor
    directions: Tensor
    probability: Tensor
    correct: Tensor
    distance: Tensor

    def as_dict(self) -> dict[str, Any]:
        """As a checkpoint holds it."""
        return dict(vars(self))

    @staticmethod
    def from_dict(values: dict[str, Any]) -> Calibration | None:
        """What `as_dict` gave; None for {}: the run has not come to its end.

        Raises:
            TypeError: something in it can't be used.
        """
        if not values:
            return None
        names = [field.name for field in fields(Calibration)]
        tensors = [values.get(name) for name in names[1:]]
        temperature = values.get("temperature")
        usable = isinstance(temperature, float) and 1e-6 < temperature < 1e6
        kinds = [torch.float32] * 4 + [torch.bool, torch.float32]
        if not usable or not all(
            isinstance(tensor, Tensor) and tensor.dtype == kind and tensor.isfinite().all()
            for tensor, kind in zip(tensors, kinds, strict=True)
        ):
            raise TypeError("its calibration isn't one")
        centre, whitening, directions, *of_validation = tensors
        width = centre.numel()
        fits = (centre.shape, whitening.shape, directions.shape[1:]) == ((width,), (width, width), (width,))
        if not fits or not len(directions) or {t.shape for t in of_validation} != {(len(of_validation[0]),)}:
            raise TypeError("the parts of its calibration don't fit together")
        return Calibration(**{name: values[name] for name in names})

    def distances(self, embeddings: Tensor) -> Tensor:
        """How far (B,) embeddings (B, C) are from the nearest class: the angle in degrees, 0 to 180, between them and
        its mean, seen from the centre.

        One covariance for all classes, as in Lee et al., 2018, https://arxiv.org/abs/1807.03888. Their distance itself
        tells little: what is of no class lies near the centre, and so no farther from the means than what is of one.
        """
        seen = F.normalize((embeddings.float() - self.centre) @ self.whitening, dim=1)
        return (seen @ self.directions.T).amax(dim=1).clamp(-1, 1).acos().rad2deg()

    @property
    def farthest(self) -> float:
        """The distance beyond which an image is unlike all classes."""
        return self.distance.quantile(FAR).item() if len(self.distance) else math.inf

    def choose_rejection(self, max_error: float) -> Rejection:
        """The lowest probability to accept so that, of the accepted validation images, at most the part `max_error`
        is wrong. Those too far from all classes are not accepted in any case."""
        near = self.distance <= self.farthest
        order = self.probability[near].argsort(descending=True)
        probability, correct = self.probability[near][order], self.correct[near][order]
        errors = (~correct).cumsum(0) / torch.arange(1, len(correct) + 1)
        last_of_equal = torch.cat([probability[1:] < probability[:-1], torch.ones(1, dtype=torch.bool)])
        allowed = torch.nonzero((errors <= max_error) & last_of_equal[: len(errors)]).flatten()
        if not len(allowed):
            return Rejection(math.inf, self.farthest)
        return Rejection(probability[allowed[-1]].item(), self.farthest)


@dataclass(frozen=True)
class Rejection:
    """Which answers are rejected.

    Attributes:
        least_probability: that is accepted; infinite: none is.
        farthest: largest distance to the nearest class, in degrees, that is accepted; infinite: all are.
    """

    least_probability: float
    farthest: float = math.inf

    def accepts(self, probability: Tensor, distance: Tensor) -> Tensor:
        """Bool (n,), for probabilities and distances (n,)."""
        return (probability >= self.least_probability) & (distance <= self.farthest)

    def reason(self, probability: float, distance: float) -> str:
        """Why an answer is rejected; empty if it isn't."""
        if distance > self.farthest:
            return (
                f"unlike all classes: {distance:.0f}° from the nearest, where {FAR:.0%} of the validation images are "
                f"within {self.farthest:.0f}°"
            )
        if probability < self.least_probability:
            least = "any" if math.isinf(self.least_probability) else f"{self.least_probability:.1%}"
            return f"not sure enough: {probability:.1%} is below {least}"
        return ""

    def format_cost(self, calibration: Calibration) -> str:
        """What it did to the validation images, in words."""
        n = len(calibration.correct)
        accepted = self.accepts(calibration.probability, calibration.distance)
        count, wrong = int(accepted.sum()), int((accepted & ~calibration.correct).sum())
        if not count:
            return f"none of the {n} validation images is accepted: no threshold gives so few errors"
        return (
            f"of {n} validation images {count / n:.1%} are accepted, {wrong / count:.1%} of them wrong; since these "
            f"images chose the threshold, of new ones a little more: eval.py shows it on test images"
        )


def fit_calibration(
    logits: Tensor, embeddings: Tensor, class_ids: Tensor, train_embeddings: Tensor, train_class_ids: Tensor
) -> Calibration:
    """Fit all of it.

    Args:
        logits: (n, classes) of the validation images.
        embeddings: (n, C) of them.
        class_ids: (n,) of them.
        train_embeddings: (m, C) of training images, seen as in evaluation.
        train_class_ids: (m,) of them.
    """
    temperature = fit_temperature(logits, class_ids)
    distance = _fit_distance(train_embeddings, train_class_ids)
    probability, predicted = (logits / temperature).softmax(dim=1).max(dim=1)
    fitted = Calibration(temperature, *distance, probability, predicted == class_ids, torch.zeros(0))
    return Calibration(**(fitted.as_dict() | {"distance": fitted.distances(embeddings)}))


def _fit_distance(embeddings: Tensor, class_ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Centre, whitening and directions, see `Calibration`, of embeddings (m, C).

    There may be fewer images than dimensions, so the covariance is Ledoit and Wolf's shrunk one.
    """
    from sklearn.covariance import ledoit_wolf  # predicting goes without

    present, rows = class_ids.unique(return_inverse=True)
    x = embeddings.double()
    means = torch.zeros(len(present), x.shape[1], dtype=x.dtype).index_add(0, rows, x)
    means /= rows.bincount()[:, None]
    covariance = torch.from_numpy(ledoit_wolf((x - means[rows]).numpy(), assume_centered=True)[0])
    variances, axes = torch.linalg.eigh(covariance)
    whitening = axes / variances.clamp_min(max(1e-6 * variances.max().item(), 1e-12)).sqrt()
    centre = means.mean(dim=0)
    return centre.float(), whitening.float(), F.normalize((means - centre) @ whitening, dim=1).float()
