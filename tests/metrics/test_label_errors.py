"""Likely label errors."""

import numpy as np
import pytest

from utils.metrics import label_errors
from utils.metrics.label_errors import find_label_errors


def planted(classes: int = 6, n: int = 300) -> tuple[np.ndarray, np.ndarray, set[int]]:
    """Labels with ten errors, confident probabilities, and the indices of the errors."""
    rng = np.random.default_rng(0)
    truth = np.arange(n) % classes
    probabilities = rng.dirichlet(np.ones(classes), n) * 0.2
    probabilities[np.arange(n), truth] += 0.8
    labels, errors = truth.copy(), rng.choice(n, 10, replace=False)
    labels[errors] = (truth[errors] + 1) % classes
    return labels, probabilities, set(errors.tolist())


@pytest.mark.parametrize("max_joint", [2000, 2])
def test_planted_errors_are_found(monkeypatch, max_joint):
    monkeypatch.setattr(label_errors, "MAX_JOINT_CLASSES", max_joint)
    labels, probabilities, errors = planted()
    found = set(find_label_errors(labels, probabilities))
    assert found <= errors and len(found) >= 8


def test_classes_without_images_make_no_difference():
    labels, probabilities, _ = planted()
    more = np.zeros((len(labels), 300))
    more[:, 7::10][:, :6] = probabilities
    assert find_label_errors(7 + 10 * labels, more) == find_label_errors(labels, probabilities)
