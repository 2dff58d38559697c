"""Numbers to figures."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from utils.cli import printable
from utils.fonts import font_families

matplotlib.rcParams["font.family"] = font_families()

Row = dict[str, float]
"""One epoch: epoch (from 1), step (updates so far), loss, top1, val_loss, val_top1, learning_rate, skipped (steps left
out), seconds, and time (at its end, in seconds since 1970)."""


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
