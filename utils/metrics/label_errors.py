"""Likely label errors from predicted probabilities."""

from __future__ import annotations

import warnings

import numpy as np


def find_label_errors(class_ids: np.ndarray, probabilities: np.ndarray) -> list[int]:
    """Return the indices of images whose label is likely wrong, the most likely first.

    Confident learning (Northcutt et al., 2021, https://arxiv.org/abs/1911.00068).

    Args:
        class_ids: (N,), the labels.
        probabilities: (N, classes), by a classifier that wasn't trained on these images.
    """
    if len(np.unique(class_ids)) < 2:
        return []
    from cleanlab.filter import find_label_issues  # slow: imports pandas

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # about classes with fewer than five images
        indices = find_label_issues(class_ids, probabilities, return_indices_ranked_by="self_confidence", n_jobs=1)
    return [int(i) for i in indices]
