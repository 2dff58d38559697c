"""The result of classifying one image."""

from __future__ import annotations

from dataclasses import dataclass

from utils.inference.rejection import UNKNOWN, Rejection


@dataclass(frozen=True)
class Prediction:
    """The predicted classes of one image.

    Attributes:
        path: the file; empty for an image in memory.
        label: the most probable class, or "unknown" if the prediction is rejected.
        probability: of the most probable class, 0 to 1.
        classes: the `top_k` most probable classes with their probabilities, most probable first.
        reason: why the prediction is rejected; empty if it isn't.
    """

    path: str
    label: str
    probability: float
    classes: tuple[tuple[str, float], ...]
    reason: str = ""

    @property
    def rejected(self) -> bool:
        """Whether the label is "unknown"."""
        return bool(self.reason)


@dataclass(frozen=True)
class Failure:
    """An image without a prediction: it can't be read, or the network's output isn't finite.

    Attributes:
        path: the file; empty for an image in memory.
        error: a message that includes the path.
    """

    path: str
    error: str


def make_prediction(
    path: str, classes: tuple[tuple[str, float], ...], rejection: Rejection | None, distance: float = 0.0
) -> Prediction:
    """Return a prediction with `classes`, most probable first, rejected where `rejection` applies.

    `distance` is the angle to the nearest class in degrees, see `Calibration.distances`.
    """
    name, probability = classes[0]
    reason = rejection.reason(probability, distance) if rejection else ""
    return Prediction(path, UNKNOWN if reason else name, probability, classes, reason)
