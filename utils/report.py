"""Numbers to files: the log of a run, and the results of an evaluation."""

from __future__ import annotations

import csv
import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter

from utils.cli import printable
from utils.fonts import font_families

matplotlib.rcParams["font.family"] = font_families()

Row = dict[str, float]
"""One epoch: epoch (from 1), step (updates so far), loss, top1, val_loss, val_top1, learning_rate, skipped (steps left
out), seconds, and time (at its end, in seconds since 1970)."""


class RunLog:
    """The log of a run in its folder: TensorBoard events, the losses as text, and their curve.

    All of it is made from the history, at each epoch and anew when a run goes on, so that there is no gap and no
    doubled point, wherever it was cut off.

    Args:
        folder: the run's folder.
        history: the epochs so far.
    """

    def __init__(self, folder: Path, history: Sequence[Row]) -> None:
        self.folder = folder
        older = list(folder.glob("events.out.tfevents.*"))
        self.writer = SummaryWriter(str(folder))
        for row in history:
            self._add_scalars(row)
        self.writer.flush()
        for path in older:
            path.unlink()

    def _add_scalars(self, row: Row) -> None:
        for name, value in row.items():
            if name not in ("step", "time"):
                self.writer.add_scalar(name, value, row["step"], walltime=row["time"])

    def log_pictures(self, network: nn.Module, pixels: Tensor) -> None:
        """Show TensorBoard some training pictures (B, 3, height, width) uint8, and the graph of `network`."""
        self.writer.add_images("train/augmented", pixels[:16], 0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # tracing warns of every shape that Python looks at
            self.writer.add_graph(network.eval(), pixels[:1].to(next(network.parameters()).device))

    def log_epoch(self, history: Sequence[Row]) -> None:
        """Write what is known after an epoch, the last row of `history`."""
        self._add_scalars(history[-1])
        self.writer.flush()
        for name, key in (("epoch_loss.txt", "loss"), ("epoch_val_loss.txt", "val_loss")):
            (self.folder / name).write_text("".join(f"{row[key]}\n" for row in history), encoding="utf-8")
        plot_losses(history).savefig(self.folder / "epoch_loss.png")

    def close(self) -> None:
        """Finish the event file."""
        self.writer.close()


def plot_losses(history: Sequence[Row]) -> Figure:
    """The curves of training and validation loss, and of validation accuracy."""
    figure = Figure(figsize=(9, 4), layout="constrained")
    loss_axes, top1_axes = figure.subplots(1, 2)
    epochs = [row["epoch"] for row in history]
    for axes, keys, title in ((loss_axes, ("loss", "val_loss"), "loss"), (top1_axes, ("top1", "val_top1"), "top-1")):
        for key, label in zip(keys, ("training", "validation"), strict=True):
            axes.plot(epochs, [row[key] for row in history], label=label, marker="." if len(epochs) < 30 else None)
        axes.set(xlabel="epoch", title=title)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
        axes.legend()
    return figure


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


def plot_bars(class_names: Sequence[str], values: Sequence[float | None], title: str) -> Figure:
    """One bar a class, from 0 to 1; a class without a value is marked as such."""
    figure = Figure(figsize=(7, 1.2 + 0.28 * len(values)), layout="constrained")
    axes = figure.subplots()
    places = np.arange(len(values))
    axes.barh(places, [value or 0 for value in values], color="#4477aa")
    for place, value in zip(places, values, strict=True):
        text = "no pictures" if value is None else f"{value:.2f}"
        axes.text((value or 0) + 0.01, place, text, va="center", fontsize=8)
    axes.set(yticks=places, yticklabels=_labels(class_names), xlim=(0, 1.12), title=title)
    axes.invert_yaxis()
    return figure


def plot_confusion(confusion: np.ndarray, class_names: Sequence[str]) -> Figure:
    """The confusion matrix (classes, classes), coloured by the part of each true class; counts where they fit."""
    n = len(confusion)
    side = min(max(4.5, 1.8 + 0.45 * n), 24)
    figure = Figure(figsize=(side, side * 0.92), layout="constrained")
    axes = figure.subplots()
    part = confusion / np.maximum(confusion.sum(axis=1, keepdims=True), 1)
    image = axes.imshow(part, cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(image, ax=axes, shrink=0.8, label="part of the true class")
    axes.set(xlabel="predicted", ylabel="true", title="confusion matrix")
    if n <= 50:
        axes.set_xticks(range(n), _labels(class_names), rotation=90)
        axes.set_yticks(range(n), _labels(class_names))
    if n <= 25:
        for row, column in zip(*np.nonzero(confusion), strict=True):
            colour = "white" if part[row, column] > 0.5 else "black"
            axes.text(column, row, confusion[row, column], ha="center", va="center", color=colour, fontsize=8)
    return figure


def _labels(class_names: Sequence[str]) -> list[str]:
    """Class names as a plot takes them: short, and with no sign that matplotlib reads as a formula."""
    short = [name if len(name) <= 24 else f"{name[:23]}…" for name in class_names]
    return [printable(name).replace("$", r"\$") for name in short]


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
