"""Comparison of two validations of the same images."""

from __future__ import annotations

import numpy as np

LEVEL = 0.025
"""Significance level of each of the two tests, 5 % in all."""


def is_worse(losses: np.ndarray, correct: np.ndarray, base_losses: np.ndarray, base_correct: np.ndarray) -> bool:
    """Whether a validation is significantly worse than another, the base: in accuracy, by McNemar's exact test, or in
    loss, by a paired t-test; one-sided, each at `LEVEL`.

    McNemar, 1947, https://doi.org/10.1007/BF02295996; Student, "The probable error of a mean", 1908.

    Args:
        losses: loss of each image, (N,).
        correct: whether each is classified correctly, (N,).

    >>> right = np.arange(100) < 90
    >>> is_worse(np.zeros(100), right & (np.arange(100) >= 8), np.zeros(100), right)
    True
    >>> is_worse(np.zeros(100), right & (np.arange(100) >= 3), np.zeros(100), right)
    False
    """
    from scipy.stats import binomtest, ttest_1samp  # slow to import

    lost, gained = int((base_correct & ~correct).sum()), int((correct & ~base_correct).sum())
    if lost > gained and binomtest(lost, lost + gained, alternative="greater").pvalue < LEVEL:
        return True
    differences = losses.astype(float) - base_losses
    if np.ptp(differences) == 0:  # all equal: the test isn't defined
        return False
    return bool(ttest_1samp(differences, 0, alternative="greater").pvalue < LEVEL)
