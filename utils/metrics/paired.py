"""Comparison of two validations of the same images."""

from __future__ import annotations

import numpy as np

LEVEL = 0.025
"""Significance level of each of the two tests, 5 % in all."""
CERTAIN = 0.05
"""Loss of a class with a probability of 95 %. Below it, losses differ by the scale of the logits, which label smoothing
limits, rather than by what a network knows."""
ONE_ERROR = 0.159
"""Level at which many images have a difference of one standard error."""


def is_worse(losses: np.ndarray, correct: np.ndarray, base_losses: np.ndarray, base_correct: np.ndarray) -> bool:
    """Whether a validation is significantly worse than another, the base: in accuracy, by McNemar's exact test, or in
    loss, by a paired t-test; one-sided, each at `LEVEL`.

    McNemar, 1947, https://doi.org/10.1007/BF02295996.

    Args:
        losses: loss of each image, (N,).
        correct: whether each is classified correctly, (N,).

    >>> right = np.arange(100) < 90
    >>> is_worse(np.zeros(100), right & (np.arange(100) >= 8), np.zeros(100), right)
    True
    >>> is_worse(np.zeros(100), right & (np.arange(100) >= 3), np.zeros(100), right)
    False
    """
    from scipy.stats import binomtest  # slow to import

    lost, gained = int((base_correct & ~correct).sum()), int((correct & ~base_correct).sum())
    if lost > gained and binomtest(lost, lost + gained, alternative="greater").pvalue < LEVEL:
        return True
    return is_higher(losses, base_losses, LEVEL)


def is_higher(losses: np.ndarray, base_losses: np.ndarray, level: float) -> bool:
    """Whether losses (N,) are higher than those of the same images in another validation, by a paired one-sided t-test
    (Student, 1908) at `level`. With few images, only large differences are. Losses below `CERTAIN` count as equal."""
    from scipy.stats import ttest_1samp  # slow to import

    differences = np.maximum(losses.astype(float), CERTAIN) - np.maximum(base_losses, CERTAIN)
    if np.ptp(differences) == 0:  # the test isn't defined
        return len(differences) > 1 and bool(differences[0] > 0)
    return bool(ttest_1samp(differences, 0, alternative="greater").pvalue < level)
