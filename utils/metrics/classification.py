"""Classification metrics with confidence intervals.

scikit-learn is imported inside functions, since it is slow to import and training doesn't need it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from utils.metrics.blocks import map_rows
from utils.metrics.intervals import bootstrap_intervals, wilson_interval
from utils.metrics.scores import Scores, expected_calibration_error, true_ranks

CLASS_METRICS = ("precision", "recall", "f1", "roc_auc", "average_precision")


def cross_entropy(logits: Tensor, class_ids: Tensor) -> float:
    """Mean cross-entropy in nats of logits (N, classes) against class ids (N,)."""
    return F.cross_entropy(logits.float(), class_ids).item()


def top_k_accuracy(logits: Tensor, class_ids: Tensor, k: int) -> float:
    """Fraction of images whose class is among the `k` with the highest logits."""
    (ranks,) = map_rows(lambda *block: (true_ranks(*block),), logits.shape[1], logits, class_ids)
    return (ranks < k).double().mean().item()


def evaluation_metrics(scores: Scores, class_names: Sequence[str]) -> dict[str, Any]:
    """Compute the metrics of `metrics.json`; docs/metrics.md documents the keys.

    The precision of a class that was never predicted is 0. Classes without images are listed in `absent_classes`,
    have None for their own metrics, and are excluded from means over classes.
    """
    n, support = len(scores), scores.support
    top = {f"top{k}": int((scores.true_ranks < k).sum()) for k in (1, 5) if k == 1 or len(class_names) > k}
    by_class = class_metrics(scores)
    precision, recall, f1, roc_auc, average_precision = (by_class[name] for name in CLASS_METRICS)
    present = support > 0
    intervals, f1_intervals = bootstrap_intervals(scores)
    return {
        "images": n,
        **{name: hits / n for name, hits in top.items()},
        "balanced_accuracy": float(recall[present].mean()),
        "macro_precision": float(precision[present].mean()),
        "macro_recall": float(recall[present].mean()),
        "macro_f1": float(f1[present].mean()),
        "log_loss": float(scores.losses.mean()),
        "brier": float(scores.briers.mean()),
        "ece": float(expected_calibration_error(scores)),
        "roc_auc": _mean(roc_auc),
        "average_precision": _mean(average_precision),
        "intervals": {name: list(wilson_interval(hits, n)) for name, hits in top.items()} | intervals,
        "absent_classes": [name for name, has_images in zip(class_names, present, strict=True) if not has_images],
        "per_class": [
            {"class": name, "support": int(support[k])} | _class_row(scores, by_class, f1_intervals, k)
            for k, name in enumerate(class_names)
        ],
    }


def class_metrics(scores: Scores) -> dict[str, np.ndarray]:
    """Each of `CLASS_METRICS` as (classes,).

    ROC-AUC and average precision are one-vs-rest, and NaN for a class that has no image or all of them.
    """
    from sklearn.metrics import average_precision_score, precision_recall_fscore_support, roc_auc_score

    precision, recall, f1, support = precision_recall_fscore_support(
        scores.class_ids, scores.predicted, labels=range(scores.num_classes), zero_division=0
    )
    roc_auc, average_precision = np.full((2, scores.num_classes), np.nan)
    for k, score in zip(scores.present, scores.present_probabilities.T, strict=True):
        if support[k] == len(scores):
            continue
        positive = scores.class_ids == k
        roc_auc[k] = roc_auc_score(positive, score)
        average_precision[k] = average_precision_score(positive, score)
    return dict(zip(CLASS_METRICS, (precision, recall, f1, roc_auc, average_precision), strict=True))


def _class_row(
    scores: Scores, by_class: dict[str, np.ndarray], f1_intervals: list[list[float] | None], k: int
) -> dict[str, float | list[float] | None]:
    """The metrics of class `k`; None, except for `predicted`, if it has no images."""
    hits, support, predicted = (int(counts[k]) for counts in (scores.hits, scores.support, scores.predictions))
    row: dict[str, Any] = {"predicted": predicted}
    if not support:
        intervals = ("precision_interval", "recall_interval", "f1_interval")
        return row | dict.fromkeys((*by_class, *intervals))
    row |= {name: None if np.isnan(values[k]) else float(values[k]) for name, values in by_class.items()}
    row["precision_interval"] = list(wilson_interval(hits, predicted))
    row["recall_interval"] = list(wilson_interval(hits, support))
    row["f1_interval"] = f1_intervals[k]
    return row


def _mean(values: np.ndarray) -> float | None:
    return None if np.isnan(values).all() else float(np.nanmean(values))
