"""What an evaluation leaves behind: files of numbers, a page, and TensorBoard's view of it."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from utils.evaluation.evaluation import Evaluation
from utils.evaluation.mistakes import margins
from utils.runs.folder import EVENTS
from utils.system.files import try_unlink, write_json, write_text
from utils.system.text import printable

EVENTS_FOLDER = "evaluation"
"""Folder in a run's for TensorBoard's events of its evaluation."""
TOP = 5
MOST_ROWS = 40


def write_numbers(folder: Path, evaluation: Evaluation) -> None:
    """Write `metrics.json`, `predictions.csv` and `confusion_matrix.csv`."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "metrics.json", evaluation.metrics)
    names = evaluation.classifier.class_names
    header = ["true \\ predicted", *names]
    rows = ([name, *map(int, row)] for name, row in zip(names, evaluation.scores.confusion, strict=True))
    write_csv(folder / "confusion_matrix.csv", [header, *rows])
    write_csv(folder / "predictions.csv", prediction_rows(evaluation))


def write_comparison(folder: Path, comparison: dict[str, Any], flipped: Sequence[Sequence[str]]) -> None:
    """Write `comparison.json`, and the rows of `flipped.csv`."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "comparison.json", comparison)
    write_csv(folder / "flipped.csv", flipped)


def prediction_rows(evaluation: Evaluation) -> list[list[str | float]]:
    """The header and a row for each image: path, truth, prediction, its probability, margin to the next, loss,
    then the next classes with their probabilities."""
    scores, names = evaluation.scores, evaluation.classifier.class_names
    top = min(TOP, len(names))
    order = np.argsort(-scores.probabilities, axis=1, kind="stable")[:, :top]
    margin = margins(scores)
    others = [f"{what}_{k}" for k in range(2, top + 1) for what in ("class", "probability")]
    rows: list[list[str | float]] = [["path", "truth", "prediction", "probability", "margin", "loss", *others]]
    for i, ranked in enumerate(order):
        probability = scores.probabilities[i]
        first, *rest = ranked.tolist()
        row = [evaluation.images.path(i), names[scores.class_ids[i]], names[first], f"{probability[first]:.6f}"]
        row += [f"{margin[i]:.6f}", f"{scores.losses[i]:.6f}"]
        rows.append(row + [cell for k in rest for cell in (names[k], f"{probability[k]:.6f}")])
    return rows


def write_csv(path: Path, rows: Sequence[Sequence[Any]]) -> None:
    """Write rows to a CSV; bytes of file names that are no UTF-8 as escapes."""
    table = io.StringIO(newline="")
    csv.writer(table).writerows(rows)
    write_text(path, table.getvalue())


def write_events(run: Path, evaluation: Evaluation, confusion: Figure, worst: np.ndarray) -> None:
    """Write for TensorBoard, in a folder of the run's: the confusion matrix, the worst mistakes, uint8 (n, height,
    width, 3), and the settings with the figures. The events of an earlier evaluation make way."""
    from torch.utils.tensorboard import SummaryWriter

    for earlier in (run / EVENTS_FOLDER).glob(f"{EVENTS}*"):
        try_unlink(earlier, "TensorBoard shows both")
    metrics = evaluation.metrics
    figures = {name: value for name, value in metrics.items() if isinstance(value, float)}
    settings = {
        name: value if isinstance(value, int | float | str | bool) else str(value)
        for name, value in evaluation.classifier.config.items()
    }
    with SummaryWriter(str(run / EVENTS_FOLDER)) as writer:
        writer.add_figure("confusion matrix", confusion)
        if len(worst):
            writer.add_images("worst mistakes", worst, dataformats="NHWC")
        writer.add_hparams(settings, {f"evaluation/{name}": value for name, value in figures.items()}, run_name=".")


def format_metrics(metrics: dict[str, Any]) -> str:
    """The numbers of an evaluation as a table; of many classes those of lowest F1."""
    rows = metrics["per_class"]
    lines = [f"{'class':<24}{'precision':>10}{'recall':>10}{'F1':>10}{'support':>10}"]
    if len(rows) > MOST_ROWS:
        rows = sorted((row for row in rows if row["support"]), key=lambda row: row["f1"])[: MOST_ROWS // 2]
        lines.insert(0, f"the {len(rows)} classes of lowest F1; all are in metrics.json")
    for row in rows:
        shares = ["-" if row[key] is None else f"{row[key]:.2%}" for key in ("precision", "recall", "f1")]
        cells = "".join(f"{share:>10}" for share in shares)
        lines.append(f"{printable(row['class']):<24}{cells}{row['support']:>10}")
    lines.append(f"{metrics['images']} images; in brackets intervals of 95 %")
    titles = {
        "top1": "top-1",
        "top5": "top-5",
        "balanced_accuracy": "balanced accuracy",
        "macro_f1": "macro F1",
        "ece": "calibration error (ECE)",
    }
    lines += [f"{title} {format_figure(metrics, key, percent=True)}" for key, title in titles.items() if key in metrics]
    lines.append(f"log-loss {format_figure(metrics, 'log_loss', percent=False)}")
    if rejection := metrics["rejection"]:
        lines.append(
            f"rejecting so that {rejection['max_error']:.0%} of the accepted would be wrong on validation: "
            f"{1 - rejection['accepted']:.1%} rejected, {_percent(rejection['error'])} of the others wrong"
        )
        if "ood" in rejection:
            lines.append(f"OOD images: {rejection['ood_rejected']:.1%} of {rejection['ood']} rejected")
    return "\n".join(lines)


def _percent(part: float | None) -> str:
    return "-" if part is None else f"{part:.1%}"


def format_figure(metrics: dict[str, Any], key: str, percent: bool) -> str:
    """A figure with its interval, such as `93.00% [91.20, 94.50]`; a dash where there is none."""
    value, interval = metrics[key], metrics["intervals"].get(key)
    if value is None:
        return "-"
    factor, digits, sign = (100, 2, "%") if percent else (1, 3, "")
    told = f"{factor * value:.{digits}f}{sign}"
    return told if interval is None else f"{told} [{', '.join(f'{factor * end:.{digits}f}' for end in interval)}]"
