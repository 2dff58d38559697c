"""utils/metrics/classification.py, scores.py and intervals.py against scikit-learn, worked examples and coverage."""

import math

import numpy as np
import pytest
import sklearn.metrics as sk
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom
from sklearn.calibration import calibration_curve

from utils.metrics.classification import cross_entropy, evaluation_metrics, top_k_accuracy
from utils.metrics.intervals import NORMAL_QUANTILE, bootstrap_intervals, resampled_rank_metrics, wilson_interval
from utils.metrics.scores import Scores, reliability

# Six images of classes a, b, c; none of d. Predictions: a b a b c d.
CLASS_IDS = torch.tensor([0, 0, 0, 1, 2, 2])
LOGITS = torch.eye(4)[[0, 1, 0, 1, 2, 3]] * 2 + torch.tensor([0.3, 0.2, 0.1, 0.0])
NAMES = ["a", "b", "c", "d"]


def evaluate(logits: torch.Tensor, class_ids: torch.Tensor, temperature: float = 1.0) -> dict:
    names = [str(k) for k in range(logits.shape[1])]
    return evaluation_metrics(Scores.from_logits(logits, class_ids, temperature), names)


def random_case(n: int = 300, classes: int = 7, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits that are somewhat informative, with ties."""
    generator = torch.Generator().manual_seed(seed)
    class_ids = torch.randint(classes, (n,), generator=generator)
    logits = torch.randn(n, classes, generator=generator) + 1.5 * torch.eye(classes)[class_ids]
    return (logits * 4).round() / 4, class_ids


def test_worked_example():
    metrics = evaluation_metrics(Scores.from_logits(LOGITS, CLASS_IDS), NAMES)
    assert metrics["images"] == 6
    assert metrics["top1"] == pytest.approx(4 / 6)
    assert "top5" not in metrics
    rows = {row["class"]: row for row in metrics["per_class"]}
    by_hand = {"a": (1.0, 2 / 3, 0.8, 3, 2), "b": (0.5, 1.0, 2 / 3, 1, 2), "c": (1.0, 0.5, 2 / 3, 2, 1)}
    for name, expected in by_hand.items():
        keys = ("precision", "recall", "f1", "support", "predicted")
        assert [rows[name][key] for key in keys] == pytest.approx(expected)
    assert {key: value for key, value in rows["d"].items() if value is not None} == {
        "class": "d",
        "support": 0,
        "predicted": 1,
    }
    assert metrics["absent_classes"] == ["d"]
    assert metrics["balanced_accuracy"] == metrics["macro_recall"] == pytest.approx((2 / 3 + 1 + 0.5) / 3)
    assert metrics["macro_precision"] == pytest.approx((1 + 0.5 + 1) / 3)
    assert metrics["intervals"]["top1"] == pytest.approx([0.300, 0.903], abs=1e-3)


def test_rows_of_the_confusion_matrix_are_true_classes():
    confusion = Scores.from_logits(LOGITS, CLASS_IDS).confusion
    assert confusion.toarray().tolist() == [[2, 1, 0, 0], [0, 1, 0, 0], [0, 0, 1, 1], [0, 0, 0, 0]]
    logits, class_ids = random_case()
    confusion = Scores.from_logits(logits, class_ids).confusion
    assert (confusion.toarray() == sk.confusion_matrix(class_ids, logits.argmax(1))).all()


def test_classes_without_images_change_no_metric():
    """They are skipped when the images are drawn again for intervals."""
    logits, class_ids = random_case()
    more = torch.cat([logits, torch.full((len(logits), 50), -80.0)], dim=1)
    few, many = evaluate(logits, class_ids), evaluate(more, class_ids)
    assert many["macro_f1"] == pytest.approx(few["macro_f1"])
    for name, interval in few["intervals"].items():
        assert many["intervals"][name] == pytest.approx(interval)
    for row, same in zip(few["per_class"], many["per_class"], strict=False):
        assert {key: pytest.approx(value) for key, value in row.items()} == same


def test_cross_entropy_by_hand():
    losses = [
        math.log(sum(math.exp(v) for v in row)) - row[t]
        for row, t in zip(LOGITS.tolist(), CLASS_IDS.tolist(), strict=True)
    ]
    assert cross_entropy(LOGITS, CLASS_IDS) == pytest.approx(sum(losses) / 6)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_metrics_equal_those_of_scikit_learn(temperature):
    logits, class_ids = random_case()
    metrics = evaluate(logits, class_ids, temperature)
    truth, p = class_ids.numpy(), (logits.double() / temperature).softmax(1).numpy()
    predicted = p.argmax(1)
    expected = {
        "top1": sk.accuracy_score(truth, predicted),
        "balanced_accuracy": sk.balanced_accuracy_score(truth, predicted),
        "macro_precision": sk.precision_score(truth, predicted, average="macro"),
        "macro_f1": sk.f1_score(truth, predicted, average="macro"),
        "log_loss": sk.log_loss(truth, p),
        "brier": ((p - np.eye(7)[truth]) ** 2).sum(1).mean(),
        "roc_auc": sk.roc_auc_score(truth, p, multi_class="ovr"),
        "average_precision": sk.average_precision_score(np.eye(7)[truth], p),
    }
    assert {name: metrics[name] for name in expected} == pytest.approx(expected)
    broken_ties = logits.numpy() - 1e-9 * np.arange(7)  # ties go to the lower id
    assert metrics["top5"] == pytest.approx(sk.top_k_accuracy_score(truth, broken_ties, k=5))
    confidence, correct = p.max(1), predicted == truth
    accuracy, mean_confidence = calibration_curve(correct, confidence, n_bins=15)
    counts, _ = np.histogram(confidence, np.linspace(0, 1, 16))
    gaps = np.abs(accuracy - mean_confidence) * counts[counts > 0] / len(truth)
    assert metrics["ece"] == pytest.approx(gaps.sum())


def test_reliability_bins_by_hand():
    """Confidences 0.6 (correct), 0.65 (wrong) and 0.95 (correct); 0.6 is the upper end of the bin from 8/15."""
    p = torch.tensor([[0.6, 0.4], [0.35, 0.65], [0.95, 0.05]], dtype=torch.float64)
    bins = reliability(Scores.from_logits(p.log(), torch.tensor([0, 0, 0])))
    assert [row["count"] for row in bins] == [1, 1, 1]
    assert [row["accuracy"] for row in bins] == [1, 0, 1]
    assert [row["confidence"] for row in bins] == pytest.approx([0.6, 0.65, 0.95])
    assert evaluate(p.log(), torch.tensor([0, 0, 0]))["ece"] == pytest.approx((0.4 + 0.65 + 0.05) / 3)


def test_top_5_by_hand_with_ties():
    logits = torch.randn(200, 9, generator=torch.Generator().manual_seed(0)).round()
    class_ids = torch.arange(200) % 9
    ranked = [sorted(range(9), key=lambda k: -row[k]) for row in logits.tolist()]  # stable sort: the lower id first
    expected = sum(t in order[:5] for order, t in zip(ranked, class_ids.tolist(), strict=True)) / 200
    assert top_k_accuracy(logits, class_ids, 5) == pytest.approx(expected)
    assert evaluate(logits, class_ids)["top5"] == pytest.approx(expected)
    assert top_k_accuracy(torch.zeros(4, 2), torch.tensor([0, 0, 1, 1]), 1) == 0.5


def test_a_single_class():
    metrics = evaluate(torch.tensor([[2.0, 1.0], [0.0, 1.0]]), torch.tensor([0, 0]))
    assert (metrics["top1"], metrics["balanced_accuracy"], metrics["absent_classes"]) == (0.5, 0.5, ["1"])
    assert metrics["macro_f1"] == pytest.approx(2 / 3)
    assert metrics["roc_auc"] is None and metrics["average_precision"] is None
    assert metrics["intervals"]["roc_auc"] is None


def test_all_correct_and_all_wrong():
    class_ids = torch.arange(30) % 3
    right = evaluate(5 * torch.eye(3)[class_ids], class_ids)
    wrong = evaluate(5 * torch.eye(3)[class_ids - 1], class_ids)
    assert (right["top1"], right["macro_f1"], right["roc_auc"]) == (1, 1, 1)
    assert (wrong["top1"], wrong["macro_f1"]) == (0, 0)
    assert right["intervals"]["top1"][1] == 1 and wrong["intervals"]["top1"][0] == 0
    assert right["intervals"]["top1"][0] > 0.85  # thirty images leave some uncertainty
    # All resamples are equal, which is no evidence of certainty.
    assert right["intervals"]["macro_f1"] is None and right["per_class"][0]["f1_interval"] is None


def test_no_images_and_nan_are_refused():
    with pytest.raises(ValueError, match="no images"):
        Scores.from_logits(torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64))
    for bad in (math.nan, math.inf):
        with pytest.raises(ValueError, match="outputs for 1 of 2 images aren't finite"):
            Scores.from_logits(torch.tensor([[0.0, bad], [0, 0]]), torch.tensor([0, 1]))


@given(st.integers(0, 500), st.integers(1, 500))
@settings(deadline=None)
def test_wilson_ends_solve_the_score_equation(hits, n):
    """Wilson, 1927: at both ends, the observed rate is 1.96 standard errors of that probability away."""
    hits = min(hits, n)
    low, high = wilson_interval(hits, n)
    assert 0 <= low <= hits / n <= high <= 1
    for end in (low, high):
        assert abs(hits / n - end) == pytest.approx(NORMAL_QUANTILE * math.sqrt(end * (1 - end) / n), abs=1e-9)


def test_wilson_covers_the_probability_in_95_percent_of_samples():
    n = 100
    intervals = np.array([wilson_interval(hits, n) for hits in range(n + 1)])
    coverage = [
        binom.pmf(np.arange(n + 1), n, p)[(intervals[:, 0] <= p) & (p <= intervals[:, 1])].sum()
        for p in np.linspace(0.1, 0.9, 81)
    ]
    assert np.mean(coverage) == pytest.approx(0.95, abs=0.005)
    assert min(coverage) > 0.92


def test_wilson_at_the_limits():
    assert all(wilson_interval(0, n)[0] == 0 and wilson_interval(n, n)[1] == 1 for n in range(1, 2000))
    assert wilson_interval(0, 0) == (0, 1)


def test_the_interval_of_a_small_calibration_error_contains_it():
    """Resampling increases the gaps by chance, and a calibrated classifier has no others."""
    generator = torch.Generator().manual_seed(13)  # here the plain percentiles don't contain it
    logits = 6 * torch.randn(300, 4, generator=generator)
    class_ids = logits.softmax(1).multinomial(1, generator=generator)[:, 0]
    metrics = evaluate(logits, class_ids)
    low, high = metrics["intervals"]["ece"]
    assert 0 <= low <= metrics["ece"] <= high


def test_resampled_rank_metrics_equal_those_of_scikit_learn():
    logits, class_ids = random_case(n=80, classes=4)
    scores = Scores.from_logits(logits, class_ids)
    weights = np.random.default_rng(0).integers(0, 4, (5, 80)).astype(np.float32)
    auc, ap = resampled_rank_metrics(scores, weights)
    p = logits.double().softmax(1).numpy()
    for row, w in enumerate(weights):
        one_hot = np.eye(4)[class_ids.numpy()]
        assert auc[row] == pytest.approx(sk.roc_auc_score(one_hot, p, sample_weight=w), abs=1e-5)
        expected = sk.average_precision_score(one_hot, p, sample_weight=w)
        assert ap[row] == pytest.approx(expected, abs=1e-5)


def test_bootstrap_intervals_of_means_are_nearly_normal():
    """For means over images, the bootstrap agrees with the normal approximation."""
    logits, class_ids = random_case(n=2000)
    scores = Scores.from_logits(logits, class_ids)
    intervals, _ = bootstrap_intervals(scores)
    for name, values in (("log_loss", scores.losses), ("brier", scores.briers)):
        half = 1.96 * values.std() / math.sqrt(len(values))
        assert intervals[name] == pytest.approx([values.mean() - half, values.mean() + half], abs=0.15 * half)


def test_intervals_contain_their_metric_and_are_deterministic():
    logits, class_ids = random_case()
    metrics = evaluate(logits, class_ids)
    for name, (low, high) in metrics["intervals"].items():
        assert low <= metrics[name] <= high, name
        assert 0 < high - low < 0.35, name
    for row in metrics["per_class"]:
        for name in ("precision", "recall", "f1"):
            low, high = row[f"{name}_interval"]
            assert low <= row[name] <= high
    assert evaluate(logits, class_ids)["intervals"] == metrics["intervals"]


def test_rank_intervals_are_none_for_many_images_and_classes():
    n = 1001
    class_ids = torch.arange(n) % 1000
    metrics = evaluate(torch.eye(1000)[class_ids] + torch.randn(n, 1000, generator=torch.Generator()), class_ids)
    assert metrics["intervals"]["roc_auc"] is None
    assert metrics["intervals"]["macro_f1"] is not None
