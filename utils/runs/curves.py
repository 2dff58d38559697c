"""Training curves."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.figure import Figure

from utils.runs.history import Row

CURVES = {
    "loss": {"loss": "training", "val_loss": "validation", "val_calibrated_loss": "validation, calibrated"},
    "top-1": {"top1": "training", "val_top1": "validation"},
}
"""The plots by title: columns of the history, and their labels."""


def plot_losses(history: Sequence[Row]) -> Figure:
    """A figure of the losses and the accuracy by epoch."""
    figure = Figure(figsize=(9, 4), layout="constrained")
    epochs = [row["epoch"] for row in history]
    for axes, (title, curves) in zip(figure.subplots(1, 2), CURVES.items(), strict=True):
        for key, label in curves.items():
            axes.plot(epochs, [row[key] for row in history], label=label, marker="." if len(epochs) < 30 else None)
        axes.set(xlabel="epoch", title=title)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
        axes.legend()
    return figure
