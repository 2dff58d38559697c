"""utils/inference/onnx_classifier.py: what a graph gives is checked."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from utils.inference.onnx_classifier import OnnxClassifier


def probabilities(*row: float) -> np.ndarray:
    """Those of one image, from a session that gives `row`."""
    output = np.array([row], np.float32)
    session = SimpleNamespace(run=lambda names, inputs, options: [output])
    metadata = SimpleNamespace(class_names=["dark", "light"])
    return OnnxClassifier(Path("x.onnx"), session, metadata).probabilities(np.zeros((1, 4, 4, 3), np.uint8))


@pytest.mark.parametrize("row", [(-5.0, 6.0), (1e30, 0.0), (0.5, 0.4), (0.7, 0.4), (1.0,)])
def test_outputs_that_are_no_probabilities_are_refused(row):
    with pytest.raises(ValueError, match=r"x\.onnx can't be used: its output is not probabilities of 2 classes"):
        probabilities(*row)


def test_probabilities_and_outputs_that_are_not_finite_pass():
    """One image whose output isn't finite doesn't end the others."""
    assert probabilities(0.25, 0.75).tolist() == [[0.25, 0.75]]
    assert np.isnan(probabilities(float("nan"), 0.5)).any()
