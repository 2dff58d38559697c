"""The report page of an evaluation: the data for the template `report_page.html`."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
from utils.evaluation.plots import arrange_classes, describe_order, fractions, select
from utils.evaluation.report_files import format_metric
from utils.inference.fit_calibration import TrainEmbeddings
from utils.inference.rejection import DISTANCE_QUANTILE
from utils.metrics.intervals import wilson_interval
from utils.metrics.scores import expected_calibration_error, reliability
from utils.runs.history import select_best
from utils.runs.log import EPOCHS
from utils.system.pages import render_page
from utils.system.text import printable

if TYPE_CHECKING:
    from scipy.sparse import csr_array

MAX_WORST, MAX_UNCERTAIN, MAX_LABEL_ERRORS = 24, 12, 24
MAX_PAIRS, MAX_IMAGES_PER_PAIR = 8, 3
"""How many images of each kind the page shows."""
MAX_CLASS_ROWS = 1000
MAX_PAIR_ROWS = 50
ERROR_RATES = (0.01, 0.02, 0.05, 0.1, 0.2)
"""Allowed error rates in the rejection table."""
CARDS = (
    ("top1", "Top-1 Accuracy", True, "predicted class is correct"),
    ("top5", "Top-5 Accuracy", True, "correct class is among the five most likely"),
    ("balanced_accuracy", "Balanced Accuracy", True, "mean recall over the classes"),
    ("macro_f1", "Macro F1", True, "mean F1 over the classes"),
    ("ece", "Calibration Error", True, "ECE, 15 bins; lower is better"),
    ("log_loss", "Log-Loss", False, "in nats; lower is better"),
    ("brier", "Brier Score", False, "0 to 2; lower is better"),
    ("roc_auc", "ROC-AUC", False, "one class against the rest, mean"),
    ("average_precision", "Average Precision", False, "one class against the rest, mean"),
)
"""The metrics at the top of the page: key, title, whether in percent, meaning."""


def render(evaluation: Evaluation, train: TrainEmbeddings | None) -> str:
    """The page as one self-contained HTML file.

    Args:
        evaluation: the evaluation to show.
        train: embeddings of training images, to show the nearest one beside a mistake.
    """
    scores, metrics, classifier = evaluation.scores, evaluation.metrics, evaluation.classifier
    names = [printable(name) for name in classifier.class_names]
    gallery = Gallery(evaluation, train)
    pairs = confused_pairs(scores)
    return render_page(
        Path(__file__).with_name("report_page.html"),
        metrics=metrics,
        checkpoint=printable(str(evaluation.checkpoint)),
        data=printable(evaluation.data),
        names=names,
        notes=[printable(note) for note in metrics["notes"]],
        cards=metric_cards(metrics),
        curves=learning_curves(read_epochs(evaluation.checkpoint.parent), classifier.config),
        confusion=confusion_cells(scores.confusion),
        pairs=pairs[:MAX_PAIR_ROWS],
        num_pairs=len(pairs),
        class_rows=list(enumerate(metrics["per_class"]))[:MAX_CLASS_ROWS],
        reliability=reliability_plots(evaluation),
        rejections=[evaluation.rejection(rate) for rate in ERROR_RATES] if classifier.can_reject else [],
        far=DISTANCE_QUANTILE,
        calibrated_on=len(classifier.calibration.correct) if classifier.can_reject else 0,
        worst=gallery.figures(worst_mistakes(scores, MAX_WORST), explained=True),
        num_wrong=int((~scores.correct).sum()),
        by_pair=[(pair, gallery.figures(pair.images[:MAX_IMAGES_PER_PAIR])) for pair in pairs[:MAX_PAIRS]],
        uncertain=[gallery.figure(i) for i in least_certain(scores, MAX_UNCERTAIN)],
        labels=label_gallery(gallery),
        slices=slice_tables(evaluation),
        corruptions=corruption_rows(evaluation),
        num_train=len(train.images) if train else 0,
    )


def label_gallery(gallery: Gallery) -> dict[str, Any]:
    """The number of likely label errors, and the first of them as figures."""
    indices = label_errors(gallery.evaluation.scores)
    return {"count": len(indices), "figures": gallery.figures(indices[:MAX_LABEL_ERRORS])}


def metric_cards(metrics: dict[str, Any]) -> list[dict[str, str]]:
    """Title, value, interval and meaning of each of `CARDS` that this evaluation has."""
    cards = []
    for key, title, percent, meaning in CARDS:
        if metrics.get(key) is not None:
            value, _, interval = format_metric(metrics, key, percent).partition(" ")
            interval = interval.strip("[]").replace(", ", " to ")
            cards.append({"title": title, "value": value, "interval": interval, "meaning": meaning})
    return cards


def read_epochs(folder: Path) -> list[dict[str, float]]:
    """The rows of a run's `epochs.csv`; none if the file is missing or malformed."""
    try:
        with (folder / EPOCHS).open(encoding="utf-8", newline="") as file:
            return [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]
    except (FileNotFoundError, IsADirectoryError, ValueError, TypeError, csv.Error):
        return []


def learning_curves(epochs: Sequence[dict[str, float]], config: dict[str, Any]) -> dict[str, Any] | None:
    """The learning curves as SVG polylines in a box of 100 by 100, with the best epoch and the end of the frozen stage.

    None unless `epochs` is the complete history of a run with these settings: a folder may hold files of several runs.
    """
    keys = ("epoch", "loss", "val_loss", "top1", "val_top1", "val_calibrated_loss", "val_calibrated_loss_error")
    trained = [row for row in epochs if row.get("epoch") != 0]  # epoch 0 has no training loss
    if len(trained) < 2 or not all(key in row and math.isfinite(row[key]) for row in trained for key in keys):
        return None
    start = [row for row in epochs if row.get("epoch") == 0]
    validated = [key for key in keys if "val" in key]
    if not all(key in row and math.isfinite(row[key]) for row in start for key in validated):
        return None
    try:
        settings = TrainConfig.from_dict(config)
    except (KeyError, TypeError, ValueError):  # settings of an exported file or of another version
        return None
    first_epoch, last = epochs[0]["epoch"], epochs[-1]["epoch"]
    if [row["epoch"] for row in epochs] != list(range(int(first_epoch), int(last) + 1)) or last > settings.epochs:
        return None
    losses = {"train": "loss", "val": "val_loss", "calibrated": "val_calibrated_loss"}
    top = max(row[key] for row in epochs for key in losses.values() if math.isfinite(row[key]))

    def place(epoch: float) -> float:
        return 100 * (epoch - first_epoch) / (last - first_epoch)

    def line(key: str, highest: float) -> str:
        rows = [row for row in epochs if math.isfinite(row[key])]
        return " ".join(f"{place(row['epoch']):.2f},{100 - 100 * row[key] / highest:.2f}" for row in rows)

    first, *later = settings.all_stages
    thaw = first.epochs if later and first.frozen != "nothing" else 0
    best = epochs[select_best(epochs, settings.epoch_shapes)]["epoch"]
    return {
        "first": int(first_epoch),
        "epochs": int(last),
        "best": int(best),
        "best_x": place(best),
        "thaw": thaw if 0 < thaw < last else None,
        "thaw_x": place(thaw + 0.5),
        "plots": [
            {"title": "Loss", "top": f"{top:.2f}", "lines": {kind: line(key, top) for kind, key in losses.items()}},
            {"title": "Top-1", "top": "100%", "lines": {"train": line("top1", 1), "val": line("val_top1", 1)}},
        ],
    }


def confusion_cells(confusion: csr_array) -> dict[str, Any]:
    """The class ids to show, why in this order, and rows of (count, fraction of the true class)."""
    order = arrange_classes(confusion)
    rows = [
        [(count, round(fraction, 3)) for count, fraction in zip(*row, strict=True)]
        for row in zip(select(confusion, order).tolist(), fractions(confusion, order).tolist(), strict=True)
    ]
    return {"order": order.tolist(), "order_reason": describe_order(confusion), "rows": rows}


def reliability_plots(evaluation: Evaluation) -> list[dict[str, Any]]:
    """Reliability diagrams before and, if the classifier is calibrated, after temperature scaling."""
    variants = [("uncalibrated", evaluation.raw_scores)]
    if evaluation.classifier.can_reject:
        variants.append((f"calibrated (temperature {evaluation.classifier.temperature:.2f})", evaluation.scores))
    plots = []
    for title, scores in variants:
        bins = reliability(scores)
        max_count = max(row["count"] for row in bins)
        plots.append(
            {
                "title": title,
                "bins": [row | {"share": row["count"] / max_count} for row in bins],
                "ece": expected_calibration_error(scores),
                "log_loss": float(scores.losses.mean()),
            }
        )
    return plots


def slice_tables(evaluation: Evaluation) -> list[dict[str, Any]]:
    """Accuracy by image size, aspect ratio and brightness."""
    correct = evaluation.scores.correct
    sizes = read_sizes(evaluation.images, evaluation.classifier.preprocessing.max_pixels)
    long, short = sizes.max(axis=1), sizes.min(axis=1)
    tables = [
        ("Shorter Side (Pixels)", short, "{:.0f}"),
        ("Aspect Ratio (Longer / Shorter Side)", long / short, "{:.2f}"),
        ("Mean Brightness (0 to 1)", evaluation.outputs.brightness.double().numpy(), "{:.2f}"),
    ]
    return [
        {"title": title, "rows": [_slice_row(row, form) for row in accuracy_by(values, correct)]}
        for title, values, form in tables
    ]


def _slice_row(row: Slice, form: str) -> dict[str, Any]:
    low, high = form.format(row.low), form.format(row.high)
    text = low if low == high else f"{low} to {high}"
    return {"range": text, "count": row.count, "accuracy": row.accuracy, "interval": row.interval}


def corruption_rows(evaluation: Evaluation) -> list[dict[str, Any]]:
    """Accuracy without corruption, then under each corruption."""
    return [
        {"name": name, "count": n, "accuracy": correct / n, "interval": wilson_interval(correct, n)}
        for name, (correct, n) in evaluation.corrupted.items()
    ]
