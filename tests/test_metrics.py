"""utils/metrics.py against a worked example and hand-written counts."""

import math

import pytest
import torch

from utils.metrics import confusion_matrix, cross_entropy, evaluation_metrics, top_k_accuracy

# Six pictures of classes a, b, c; none of d. Predictions: a b a b c d.
TARGETS = torch.tensor([0, 0, 0, 1, 2, 2])
LOGITS = torch.eye(4)[[0, 1, 0, 1, 2, 3]] * 2 + torch.tensor([0.3, 0.2, 0.1, 0.0])
NAMES = ["a", "b", "c", "d"]


def test_worked_example():
    metrics = evaluation_metrics(LOGITS, TARGETS, NAMES)
    assert metrics["pictures"] == 6
    assert metrics["top1"] == pytest.approx(4 / 6)
    assert "top5" not in metrics
    rows = {row["class"]: row for row in metrics["per_class"]}
    assert rows["a"] == {
        "class": "a",
        "precision": 1.0,
        "recall": pytest.approx(2 / 3),
        "f1": pytest.approx(0.8),
        "support": 3,
    }
    assert rows["b"] == {"class": "b", "precision": 0.5, "recall": 1.0, "f1": pytest.approx(2 / 3), "support": 1}
    assert rows["c"] == {"class": "c", "precision": 1.0, "recall": 0.5, "f1": pytest.approx(2 / 3), "support": 2}
    assert rows["d"] == {"class": "d", "precision": None, "recall": None, "f1": None, "support": 0}
    assert metrics["absent_classes"] == ["d"]
    assert metrics["mean_recall"] == pytest.approx((2 / 3 + 1 + 0.5) / 3)
    assert metrics["mean_precision"] == pytest.approx((1 + 0.5 + 1) / 3)


def test_confusion_has_the_truth_in_rows():
    assert confusion_matrix(LOGITS, TARGETS).tolist() == [[2, 1, 0, 0], [0, 1, 0, 0], [0, 0, 1, 1], [0, 0, 0, 0]]


def test_loss_by_hand():
    losses = [
        math.log(sum(math.exp(v) for v in row)) - row[t]
        for row, t in zip(LOGITS.tolist(), TARGETS.tolist(), strict=True)
    ]
    assert cross_entropy(LOGITS, TARGETS) == pytest.approx(sum(losses) / 6)


def test_top_5_by_hand():
    logits = torch.randn(200, 9, generator=torch.Generator().manual_seed(0))
    targets = torch.arange(200) % 9
    ranked = [sorted(range(9), key=lambda k: -row[k]) for row in logits.tolist()]
    expected = sum(t in order[:5] for order, t in zip(ranked, targets.tolist(), strict=True)) / 200
    assert top_k_accuracy(logits, targets, 5) == pytest.approx(expected)
    metrics = evaluation_metrics(logits, targets, [str(i) for i in range(9)])
    assert metrics["top5"] == pytest.approx(expected)
