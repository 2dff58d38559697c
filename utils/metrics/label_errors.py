"""Likely label errors from predicted probabilities."""

from __future__ import annotations

import warnings

import numpy as np

MAX_JOINT_CLASSES = 2000
"""Classes whose joint counts (classes, classes) are computed; it takes seconds and about 200 MB."""


def find_label_errors(class_ids: np.ndarray, probabilities: np.ndarray) -> list[int]:
    """Return the indices of images whose label is likely wrong, the most likely first.

    Confident learning (Northcutt et al., 2021, https://arxiv.org/abs/1911.00068). With images of more than
    `MAX_JOINT_CLASSES` classes, the images with the lowest probability of their label, as many as it estimates to be
    wrong.

    Args:
        class_ids: (N,), the labels.
        probabilities: (N, classes), by a classifier that wasn't trained on these images.
    """
    present, labels = np.unique(class_ids, return_inverse=True)
    if len(present) < 2:
        return []
    if len(present) < probabilities.shape[1]:
        probabilities = probabilities[:, present]  # no image is labeled as another class
    # slow: imports pandas
    from cleanlab.experimental.label_issues_batched import find_label_issues_batched
    from cleanlab.filter import find_label_issues

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # about classes with fewer than five images
        if len(present) > MAX_JOINT_CLASSES:
            method = {"method": "self_confidence"}
            indices = find_label_issues_batched(
                labels, probabilities, quality_score_kwargs=method, n_jobs=1, verbose=False
            )
        else:
            indices = find_label_issues(labels, probabilities, return_indices_ranked_by="self_confidence", n_jobs=1)
    return [int(i) for i in indices]
