"""Logits and targets to plain numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch.nn.functional as F
from torch import Tensor


def cross_entropy(logits: Tensor, targets: Tensor) -> float:
    """Mean cross-entropy in nats of logits (N, classes) against class ids (N,)."""
    return F.cross_entropy(logits.float(), targets).item()


def top_k_accuracy(logits: Tensor, targets: Tensor, k: int) -> float:
    """The part of the pictures, 0 to 1, whose class is among the `k` of highest logit."""
    hits = logits.topk(k, dim=1).indices == targets[:, None]  # (N, k)
    return hits.any(dim=1).double().mean().item()


def confusion_matrix(logits: Tensor, targets: Tensor) -> np.ndarray:
    """Counts (classes, classes): row the true class, column the predicted one."""
    import sklearn.metrics

    predicted = logits.argmax(dim=1).numpy()
    return sklearn.metrics.confusion_matrix(targets.numpy(), predicted, labels=range(logits.shape[1]))


def evaluation_metrics(logits: Tensor, targets: Tensor, class_names: Sequence[str]) -> dict[str, Any]:
    """What `metrics.json` holds; its keys are described in the README.

    Precision of a class that was never predicted counts as 0. Means over classes are taken over those that have
    pictures; a class without any has no recall, precision and F1 (None) and is named under `absent_classes`.

    Args:
        logits: (N, classes).
        targets: (N,) class ids.
        class_names: name of each class id.
    """
    import sklearn.metrics

    predicted = logits.argmax(dim=1).numpy()
    precision, recall, f1, support = sklearn.metrics.precision_recall_fscore_support(
        targets.numpy(), predicted, labels=range(len(class_names)), zero_division=0
    )
    present = support > 0
    per_class = [
        {
            "class": name,
            "precision": float(precision[i]) if present[i] else None,
            "recall": float(recall[i]) if present[i] else None,
            "f1": float(f1[i]) if present[i] else None,
            "support": int(support[i]),
        }
        for i, name in enumerate(class_names)
    ]
    metrics: dict[str, Any] = {"pictures": len(targets), "top1": top_k_accuracy(logits, targets, 1)}
    if len(class_names) > 5:
        metrics["top5"] = top_k_accuracy(logits, targets, 5)
    return metrics | {
        "loss": cross_entropy(logits, targets),
        "mean_recall": float(recall[present].mean()),
        "mean_precision": float(precision[present].mean()),
        "absent_classes": [name for i, name in enumerate(class_names) if not present[i]],
        "per_class": per_class,
    }
