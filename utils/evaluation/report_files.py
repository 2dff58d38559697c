"""Output files of an evaluation: JSON, CSV, TensorBoard events; and the table for the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from utils.evaluation.evaluation import Evaluation
from utils.evaluation.mistakes import margins
from utils.runs.folder import EVENTS
from utils.system.csv_text import csv_row
from utils.system.files import refuse_link, try_unlink, write_json, write_text
from utils.system.text import count_of, format_table

EVENTS_FOLDER = "evaluation"
"""Subfolder of a run for the TensorBoard events of its evaluation."""
MAX_COLUMNS = 1000
"""With more classes, `confusion_matrix.csv` is in long form."""
PER_CLASS = {"precision": "precision", "recall": "recall", "f1": "F1"}
"""Columns of the table of classes: title by key."""
MAX_ROWS = 40
"""With more classes, only the `MAX_ROWS // 2` with the lowest F1 are printed."""


def write_metrics(folder: Path, evaluation: Evaluation) -> None:
    """Write `metrics.json`, `predictions.csv` and `confusion_matrix.csv`."""
    write_json(folder / "metrics.json", evaluation.metrics)
    write_csv(folder / "confusion_matrix.csv", confusion_rows(evaluation))
    write_csv(folder / "predictions.csv", prediction_rows(evaluation))


def confusion_rows(evaluation: Evaluation) -> list[list[str | int]]:
    """The rows of `confusion_matrix.csv`: the matrix, or, above `MAX_COLUMNS` classes, its counts that aren't zero."""
    confusion, names = evaluation.scores.confusion, evaluation.classifier.class_names
    if len(names) <= MAX_COLUMNS:
        rows = ([name, *row] for name, row in zip(names, confusion.toarray().tolist(), strict=True))
        return [["true \\ predicted", *names], *rows]
    counts = confusion.tocoo()
    cells = zip(counts.row.tolist(), counts.col.tolist(), counts.data.tolist(), strict=True)
    return [["true", "predicted", "count"], *([names[i], names[j], count] for i, j, count in sorted(cells))]


def write_comparison(folder: Path, comparison: dict[str, Any], flipped: Sequence[Sequence[str]]) -> None:
    """Write `comparison.json` and `flipped.csv`."""
    write_json(folder / "comparison.json", comparison)
    write_csv(folder / "flipped.csv", flipped)


def prediction_rows(evaluation: Evaluation) -> list[list[str | float]]:
    """The rows of `predictions.csv`: the header, then one row per image."""
    scores, names = evaluation.scores, evaluation.classifier.class_names
    margin = margins(scores)
    others = [f"{column}_{k}" for k in range(2, scores.top.shape[1] + 1) for column in ("class", "probability")]
    rows: list[list[str | float]] = [["path", "truth", "prediction", "probability", "margin", "loss", *others]]
    for i, (ids, probabilities) in enumerate(zip(scores.top, scores.top_probabilities, strict=True)):
        first, *rest = [(names[k], f"{p:.6f}") for k, p in zip(ids, probabilities, strict=True)]
        row = [evaluation.images.path(i), names[scores.class_ids[i]], *first]
        row += [f"{margin[i]:.6f}", f"{scores.losses[i]:.6f}"]
        rows.append(row + [cell for pair in rest for cell in pair])
    return rows


def write_csv(path: Path, rows: Sequence[Sequence[Any]]) -> None:
    """Write rows to a CSV file."""
    write_text(path, "".join(f"{csv_row(row)}\r\n" for row in rows))


def write_events(run: Path, evaluation: Evaluation, confusion: Figure, worst: np.ndarray) -> None:
    """Write TensorBoard events to a subfolder of the run, replacing those of an earlier evaluation.

    They hold the confusion matrix, the worst mistakes, uint8 (n, height, width, 3), and the settings with the metrics.
    """
    from torch.utils.tensorboard import SummaryWriter

    refuse_link(run / EVENTS_FOLDER)
    for earlier in (run / EVENTS_FOLDER).glob(f"{EVENTS}*"):
        try_unlink(earlier, "TensorBoard will show both evaluations")
    metrics = {f"evaluation/{name}": v for name, v in evaluation.metrics.items() if isinstance(v, float)}
    settings = {
        name: value if isinstance(value, int | float | str | bool) else str(value)
        for name, value in evaluation.classifier.config.items()
    }
    with SummaryWriter(str(run / EVENTS_FOLDER)) as writer:
        writer.add_figure("confusion matrix", confusion)
        if len(worst):
            writer.add_images("worst mistakes", worst, dataformats="NHWC")
        writer.add_hparams(settings, metrics, run_name=".")


def format_metrics(metrics: dict[str, Any]) -> str:
    """The metrics as a table for the terminal."""
    rows = metrics["per_class"]
    lines = []
    if len(rows) > MAX_ROWS:
        rows = sorted((row for row in rows if row["support"]), key=lambda row: row["f1"])[: MAX_ROWS // 2]
        lines.append(f"the {len(rows)} classes with the lowest F1; metrics.json has all")
    table = [("class", *PER_CLASS.values(), "support")]
    for row in rows:
        values = ["-" if row[key] is None else f"{row[key]:.2%}" for key in PER_CLASS]
        table.append((row["class"], *values, str(row["support"])))
    lines.append(format_table(table, right=table[0][1:]))
    lines.append(f"{count_of(metrics['images'], 'image')}; 95% intervals in brackets")
    titles = {
        "top1": "top-1",
        "top5": "top-5",
        "balanced_accuracy": "balanced accuracy",
        "macro_f1": "macro F1",
        "ece": "calibration error (ECE)",
    }
    lines += [f"{title} {format_metric(metrics, key, percent=True)}" for key, title in titles.items() if key in metrics]
    lines.append(f"log-loss {format_metric(metrics, 'log_loss', percent=False)}")
    if rejection := metrics["rejection"]:
        error = "-" if rejection["error"] is None else f"{rejection['error']:.1%}"
        lines.append(
            f"with rejection at max_error={rejection['max_error']:g}: {1 - rejection['accepted']:.1%} rejected, "
            f"{error} of the accepted wrong"
        )
        if "ood" in rejection:
            lines.append(f"OOD images: {rejection['ood_rejected']:.1%} of {rejection['ood']} rejected")
    return "\n".join(lines)


def format_metric(metrics: dict[str, Any], key: str, percent: bool) -> str:
    """A metric with its interval, such as `93.00% [91.20, 94.50]`, or a dash if it is None."""
    value, interval = metrics[key], metrics["intervals"].get(key)
    if value is None:
        return "-"
    factor, digits, sign = (100, 2, "%") if percent else (1, 3, "")
    text = f"{factor * value:.{digits}f}{sign}"
    return text if interval is None else f"{text} [{', '.join(f'{factor * end:.{digits}f}' for end in interval)}]"
