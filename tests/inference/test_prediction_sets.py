"""Sets of classes: utils/inference/prediction_sets.py and predict.py --coverage."""

import json

import numpy as np
import pytest
import torch
from scipy.stats import betabinom

from predict import main
from utils.inference.classifier import load_classifier
from utils.inference.prediction import Prediction
from utils.inference.prediction_sets import images_needed, keep_set, set_threshold
from utils.inference.rejection import Calibration
from utils.runs.checkpoint import BEST, load_checkpoint, save_checkpoint

PREDICTION = Prediction("x.png", "a", 0.5, (("a", 0.5), ("b", 0.3), ("c", 0.2)))


@pytest.mark.parametrize("coverage", [0.8, 0.9, 0.95])
def test_coverage_over_a_thousand_splits(coverage):
    """It is distributed as theory says: beta-binomial, for validation and test images of one distribution
    (Vovk, "Conditional validity of inductive conformal predictors", 2012)."""
    n, m, splits = 99, 200, 1000
    generator = torch.Generator().manual_seed(0)
    probabilities = torch.rand(splits, n + m, generator=generator) ** 0.3  # of true classes, of an uncertain network
    covered = np.array([(row[n:] >= set_threshold(row[:n], coverage)).sum().item() for row in probabilities])
    below = round((n + 1) * (1 - coverage))
    expected = betabinom(m, n + 1 - below, below)
    assert covered.mean() / m == pytest.approx(coverage, abs=0.005)
    assert covered.std() == pytest.approx(expected.std(), rel=0.1)


def test_few_validation_images_allow_no_smaller_set():
    for coverage, needed in ((0.9, 9), (0.95, 19), (0.5, 1), (0.99, 99)):
        assert images_needed(coverage) == needed
        assert set_threshold(torch.full((needed - 1,), 0.7), coverage) == 0.0
        assert set_threshold(torch.full((needed,), 0.7), coverage) == pytest.approx(0.7)


def test_a_set_has_the_classes_from_the_threshold_on_and_at_least_one():
    assert keep_set(PREDICTION, 0.3).classes == (("a", 0.5), ("b", 0.3))
    assert keep_set(PREDICTION, 0.0) == PREDICTION
    assert keep_set(PREDICTION, 0.9).classes == (("a", 0.5),)


def test_the_calibration_of_a_run_has_the_probabilities_of_the_true_classes(trained):
    calibration = load_classifier("").calibration
    assert calibration.true_probability.shape == calibration.probability.shape
    right = calibration.correct
    assert torch.equal(calibration.true_probability[right], calibration.probability[right])
    assert (calibration.true_probability[~right] <= calibration.probability[~right]).all()
    values = {name: value for name, value in calibration.as_dict().items() if name != "true_probability"}
    assert Calibration.from_dict(values).true_probability is None  # of an earlier version
    with pytest.raises(TypeError, match="inconsistent shapes"):
        Calibration.from_dict(values | {"true_probability": torch.ones(1)})


def test_command(trained, tmp_path, capsys):
    """Four validation images: enough for a coverage of 0.8, too few for 0.9."""
    assert main(("datasets/test",), json_lines=True, coverage=0.9) == 0
    output = capsys.readouterr()
    assert "warning: all classes are printed: 90% need 9 validation images, there are 4" in output.err
    assert {len(json.loads(line)["predictions"]) for line in output.out.splitlines()} == {2}
    assert main(("datasets/test",), json_lines=True, coverage=0.8) == 0
    output = capsys.readouterr()
    threshold = load_classifier("").calibration.true_probability.min().item()
    assert f"classes from {threshold:.2%} on are printed, for a coverage of 80% by 4 images" in output.err
    for line in output.out.splitlines():
        probabilities = [row["probability"] for row in json.loads(line)["predictions"]]
        assert len(probabilities) == 1 or min(probabilities) >= threshold
    with pytest.raises(ValueError, match="coverage=1: give a number between 0 and 1"):
        main(("datasets/test",), coverage=1)
    for flags, message in (({"tta": True}, "had no views"), ({"csv_lines": True}, "use json in one run")):
        with pytest.raises(ValueError, match=f"coverage: can't be combined with .*{message}"):
            main(("datasets/test",), coverage=0.9, **flags)
    with pytest.raises(ValueError, match="needs a calibrated checkpoint, and raw is set"):
        main(("datasets/test",), coverage=0.9, raw=True)
    content = load_checkpoint(next(trained.glob(f"logs/*/{BEST}")))
    del content["calibration"]["true_probability"]
    save_checkpoint(tmp_path / "earlier.safetensors", content | {"format_version": 6})
    with pytest.raises(ValueError, match="only the best one of a run finished by this version is"):
        main((str(tmp_path / "earlier.safetensors"), "datasets/test"), coverage=0.9)
