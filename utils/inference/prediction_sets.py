"""Sets of classes that contain the true one with a chosen probability: split conformal prediction.

Vovk et al., "Algorithmic Learning in a Random World", 2005; the sets by a threshold on the probability are those of
Sadinle et al., "Least Ambiguous Set-Valued Classifiers with Bounded Error Levels", 2019,
https://doi.org/10.1080/01621459.2017.1395341.
"""

from __future__ import annotations

import math
from dataclasses import replace

from torch import Tensor

from utils.inference.prediction import Prediction


def set_threshold(true_probability: Tensor, coverage: float) -> float:
    """The probability from which on a class belongs to the set.

    Of images like those of the validation list, but new, at least `coverage` have their true class in the set, on
    average over validation lists of this size. If these are too few for that, the threshold is 0: all classes belong.

    Args:
        true_probability: of the true class of each validation image, (n,).
        coverage: above 0, below 1.

    >>> import torch
    >>> set_threshold(torch.arange(1, 100) / 100, 0.9)
    0.10000000149011612
    """
    below = math.floor((len(true_probability) + 1) * (1 - coverage) + 1e-9)  # of rounding, as in 1 - 0.9
    return true_probability.sort().values[below - 1].item() if below else 0.0


def images_needed(coverage: float) -> int:
    """The number of validation images from which on a set can lack a class."""
    return math.ceil(1 / (1 - coverage) - 1e-9) - 1


def keep_set(prediction: Prediction, threshold: float) -> Prediction:
    """A prediction with the classes from `threshold` on, at least one, of a prediction with all classes."""
    kept = tuple((name, p) for name, p in prediction.classes if p >= threshold)
    return replace(prediction, classes=kept or prediction.classes[:1])
