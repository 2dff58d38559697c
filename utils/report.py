"""The results of an evaluation to files, and to the terminal."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from utils.plots import plot_bars, plot_confusion


def write_evaluation(
    folder: str | Path, metrics: dict[str, Any], confusion: np.ndarray, class_names: Sequence[str]
) -> None:
    """Write `metrics.json`, `confusion_matrix.csv`, and pictures of recall, precision and the confusion matrix.

    Args:
        folder: where to; made if need be.
        metrics: from `utils.metrics.evaluation_metrics`.
        confusion: (classes, classes), row the true class.
        class_names: name of each class id.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
    table = folder / "confusion_matrix.csv"
    with table.open("w", newline="", encoding="utf-8", errors="backslashreplace") as file:
        writer = csv.writer(file)
        writer.writerow(["true \\ predicted", *class_names])
        writer.writerows([name, *map(int, row)] for name, row in zip(class_names, confusion, strict=True))
    for key in ("recall", "precision"):
        values = [row[key] for row in metrics["per_class"]]
        mean = metrics[f"mean_{key}"]
        plot_bars(class_names, values, f"mean {key} {mean:.2%}").savefig(folder / f"{key}.png")
    plot_confusion(confusion, class_names).savefig(folder / "confusion_matrix.png")


def format_metrics(metrics: dict[str, Any]) -> str:
    """The numbers of an evaluation as a table."""
    lines = [f"{'class':<24}{'precision':>10}{'recall':>10}{'F1':>10}{'support':>10}"]
    for row in metrics["per_class"]:
        shares = ["-" if row[key] is None else f"{row[key]:.2%}" for key in ("precision", "recall", "f1")]
        lines.append(f"{row['class']:<24}" + "".join(f"{share:>10}" for share in shares) + f"{row['support']:>10}")
    lines.append(f"{metrics['pictures']} pictures, loss {metrics['loss']:.4f}")
    for key, title in (("top1", "top-1"), ("top5", "top-5"), ("mean_recall", "mean recall")):
        if key in metrics:
            lines.append(f"{title} {metrics[key]:.2%}")
    lines.append(f"mean precision {metrics['mean_precision']:.2%}")
    if metrics["absent_classes"]:
        lines.append(f"no pictures, so not in the means: {', '.join(metrics['absent_classes'])}")
    return "\n".join(lines)
