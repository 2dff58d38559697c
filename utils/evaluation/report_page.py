"""The page of an evaluation: what it shows, put together for `report_page.html`."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np

from utils.config.train_config import TrainConfig
from utils.evaluation.evaluation import Evaluation
from utils.evaluation.gallery import Gallery
from utils.evaluation.mistakes import (
    Slice,
    accuracy_by,
    confused_pairs,
    label_errors,
    least_certain,
    read_sizes,
    worst_mistakes,
)
from utils.evaluation.plots import arrange_classes
from utils.evaluation.report_files import format_figure
from utils.inference.fit_calibration import TrainEmbeddings
from utils.inference.rejection import FAR
from utils.metrics.intervals import wilson_interval
from utils.metrics.scores import expected_calibration_error, reliability
from utils.runs.log import EPOCHS
from utils.system.text import printable

WORST, UNCERTAIN, LABELS, PAIRS, OF_A_PAIR = 24, 12, 24, 8, 3
"""Images of each kind that are shown; pairs of classes, and images of each."""
ERROR_RATES = (0.01, 0.02, 0.05, 0.1, 0.2)
MOST_CLASS_ROWS = 1000
MOST_PAIR_ROWS = 50


def render(evaluation: Evaluation, train: TrainEmbeddings | None) -> str:
    """The page, with everything in it.

    Args:
        evaluation: what it is about.
        train: training images, to show the nearest of beside a mistake.
    """
    scores, metrics, names = evaluation.scores, evaluation.metrics, evaluation.classifier.class_names
    gallery = Gallery(evaluation, train)
    pairs = confused_pairs(scores)
    epochs = read_epochs(evaluation.checkpoint.parent)
    template = Path(__file__).with_name("report_page.html").read_text(encoding="utf-8")
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters["percent"] = lambda value: "–" if value is None else f"{value:.1%}"
    return environment.from_string(template).render(
        metrics=metrics,
        checkpoint=printable(str(evaluation.checkpoint)),
        data=printable(evaluation.data),
        names=[printable(name) for name in names],
        notes=[printable(note) for note in metrics["notes"]],
        cards=cards(metrics),
        curves=curves(epochs, evaluation.classifier.config),
        confusion=confusion_cells(scores.confusion),
        pairs=[
            {"truth": pair.truth, "predicted": pair.predicted, "count": len(pair.images)}
            for pair in pairs[:MOST_PAIR_ROWS]
        ],
        num_pairs=len(pairs),
        class_rows=list(enumerate(metrics["per_class"]))[:MOST_CLASS_ROWS],
        reliability=reliability_plots(evaluation),
        rejections=[evaluation.rejection(rate) for rate in ERROR_RATES] if evaluation.classifier.can_reject else [],
        far=FAR,
        calibrated_on=len(evaluation.classifier.calibration.correct) if evaluation.classifier.can_reject else 0,
        worst=gallery.figures(worst_mistakes(scores, WORST), explained=True),
        num_wrong=int((~scores.correct).sum()),
        by_pair=[
            {
                "truth": printable(names[pair.truth]),
                "predicted": printable(names[pair.predicted]),
                "count": len(pair.images),
                "figures": gallery.figures(pair.images[:OF_A_PAIR]),
            }
            for pair in pairs[:PAIRS]
        ],
        uncertain=[gallery.figure(i) for i in least_certain(scores, UNCERTAIN)],
        labels=label_gallery(gallery),
        slices=slices(evaluation),
        corruptions=corruption_rows(evaluation),
        has_train=len(train.images) if train else 0,
    )


def label_gallery(gallery: Gallery) -> dict[str, Any]:
    """The images whose label is likely wrong, and how many there are."""
    found = label_errors(gallery.evaluation.scores)
    return {"count": len(found), "figures": gallery.figures(found[:LABELS])}


def cards(metrics: dict[str, Any]) -> list[dict[str, str]]:
    """The figures at the top: name, value with its interval, and what it means."""
    shown = [
        ("top1", "Top-1", True, "of the images are named right"),
        ("top5", "Top-5", True, "have their class among the five likeliest"),
        ("balanced_accuracy", "Balanced accuracy", True, "every class counting alike"),
        ("macro_f1", "Macro F1", True, "precision and recall, every class alike"),
        ("ece", "Calibration error", True, "gap between claimed and actual accuracy (ECE, 15 bins)"),
        ("log_loss", "Log-loss", False, "nats; lower is better"),
        ("brier", "Brier score", False, "0 to 2; lower is better"),
        ("roc_auc", "ROC-AUC", False, "one class against the rest, mean"),
        ("average_precision", "Average precision", False, "one class against the rest, mean"),
    ]
    rows = []
    for key, title, percent, meaning in shown:
        if metrics.get(key) is not None:
            value, _, interval = format_figure(metrics, key, percent).partition(" ")
            rows.append(
                {
                    "title": title,
                    "value": value,
                    "interval": interval.strip("[]").replace(", ", " to "),
                    "meaning": meaning,
                }
            )
    return rows


def read_epochs(folder: Path) -> list[dict[str, float]]:
    """The rows of a run's epochs, as far as its folder has them."""
    path = folder / EPOCHS
    if not path.is_file():
        return []
    try:
        with path.open(encoding="utf-8", newline="") as file:
            return [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]
    except (ValueError, TypeError, KeyError, csv.Error):
        return []


def curves(epochs: Sequence[dict[str, float]], config: dict[str, Any]) -> dict[str, Any] | None:
    """The learning curves as lines of points in a box of 100 by 100, and where the backbone was thawed."""
    keys = ("epoch", "loss", "val_loss", "top1", "val_top1", "val_calibrated_loss", "val_calibrated_loss_error")
    if len(epochs) < 2 or not all(key in row and math.isfinite(row[key]) for row in epochs for key in keys):
        return None
    try:
        settings = TrainConfig.from_dict(config)
    except (KeyError, TypeError, ValueError):  # of an export, or of another version
        return None
    last = epochs[-1]["epoch"]
    if [row["epoch"] for row in epochs] != list(range(1, len(epochs) + 1)) or last > settings.epochs:
        return None
    losses = {"train": "loss", "val": "val_loss", "calibrated": "val_calibrated_loss"}
    top = max(row[key] for row in epochs for key in losses.values())

    def line(key: str, highest: float) -> str:
        points = ((100 * (row["epoch"] - 1) / (last - 1), 100 - 100 * row[key] / highest) for row in epochs)
        return " ".join(f"{x:.2f},{y:.2f}" for x, y in points)

    first, *later = settings.all_stages
    thaw = first.epochs if later and first.frozen != "nothing" else 0
    best = settings.best_epoch(epochs) + 1
    return {
        "epochs": int(last),
        "best": int(best),
        "best_x": 100 * (best - 1) / (last - 1),
        "thaw": thaw if 0 < thaw < last else None,
        "thaw_x": 100 * (thaw - 0.5) / (last - 1),
        "plots": [
            {"title": "Loss", "top": f"{top:.2f}", "lines": {kind: line(key, top) for kind, key in losses.items()}},
            {"title": "Top-1", "top": "100 %", "lines": {"train": line("top1", 1), "val": line("val_top1", 1)}},
        ],
    }


def confusion_cells(confusion: np.ndarray) -> dict[str, Any]:
    """Of the classes that are shown: their ids, and rows of counts with the part of the true class that each is."""
    order = arrange_classes(confusion)
    part = confusion / np.maximum(confusion.sum(axis=1, keepdims=True), 1)
    rows = [[(int(confusion[i, j]), round(float(part[i, j]), 3)) for j in order] for i in order]
    return {"order": order.tolist(), "rows": rows}


def reliability_plots(evaluation: Evaluation) -> list[dict[str, Any]]:
    """The bins of reliability, of the network and, where it is calibrated, with its temperature."""
    sides = [("as the network gives them", evaluation.raw_scores)]
    if evaluation.classifier.can_reject:
        sides.append((f"divided by the temperature {evaluation.classifier.temperature:.2f}", evaluation.scores))
    plots = []
    for title, scores in sides:
        bins = reliability(scores)
        most = max(row["count"] for row in bins)
        plots.append(
            {
                "title": title,
                "bins": [row | {"share": row["count"] / most} for row in bins],
                "ece": expected_calibration_error(scores),
                "log_loss": float(scores.losses.mean()),
            }
        )
    return plots


def slices(evaluation: Evaluation) -> list[dict[str, Any]]:
    """Accuracy by size, by aspect ratio and by brightness."""
    correct = evaluation.scores.correct
    sizes = read_sizes(evaluation.images, evaluation.classifier.preprocessing.max_pixels)
    long, short = sizes.max(axis=1), sizes.min(axis=1)
    tables = [
        ("Short side in pixels", short, "{:.0f}"),
        ("Long side to short side", long / short, "{:.2f}"),
        ("Brightness, 0 to 1", evaluation.outputs.brightness.double().numpy(), "{:.2f}"),
    ]
    return [
        {"title": title, "rows": [_slice_row(row, form) for row in accuracy_by(values, correct)]}
        for title, values, form in tables
    ]


def _slice_row(part: Slice, form: str) -> dict[str, Any]:
    low, high = form.format(part.low), form.format(part.high)
    told = low if low == high else f"{low} to {high}"
    return {"range": told, "count": part.count, "accuracy": part.accuracy, "interval": part.interval}


def corruption_rows(evaluation: Evaluation) -> list[dict[str, Any]]:
    """Accuracy as it is, then under each corruption."""
    rows = []
    for name, (hits, count) in evaluation.corrupted.items():
        told = "as they are" if name == "none" else name
        rows.append({"name": told, "count": count, "accuracy": hits / count, "interval": wilson_interval(hits, count)})
    return rows
