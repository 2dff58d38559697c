"""The results of finished epochs, and which of them is selected."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import groupby

from utils.system.text import count_of

COLUMNS = (
    *("epoch", "step", "loss", "top1", "val_loss", "val_top1", "val_calibrated_loss", "val_calibrated_loss_error"),
    *("learning_rate", "skipped", "seconds", "time"),
)
Row = dict[str, float]
"""One epoch: epoch (from 1; 0 is the state before the first step), step (optimizer steps so far), loss, top1 (NaN for
epoch 0), val_loss, val_top1, val_calibrated_loss (after temperature scaling), val_calibrated_loss_error (its standard
error), learning_rate, skipped (steps), seconds, time (its end, Unix time), and, not in earlier versions, val_worse (1:
significantly worse than epoch 0) and val_beaten (1: the loss is higher than the lowest so far at this input shape, not
counting epochs that are worse than epoch 0, by more than a standard error of the difference); see
`utils.metrics.paired`."""


def start_row(validation: Mapping[str, float]) -> Row:
    """The row of epoch 0, with the metrics of its validation, without its times."""
    nothing = {"epoch": 0, "step": 0, "loss": math.nan, "top1": math.nan}
    return nothing | dict(validation) | {"learning_rate": 0.0, "skipped": 0}


def select_best(rows: Sequence[Mapping[str, float]], shapes: Sequence[tuple[int, int]]) -> int:
    """The index of the selected row: the latest whose calibrated validation loss is within one standard error of the
    lowest so far, among those that aren't significantly worse than epoch 0, and among the last ones with the same input
    shape (other losses aren't comparable). If all of these are worse, the one selected before.

    The one-standard-error rule is from Breiman et al., Classification and Regression Trees, 1984, section 3.4.3; they
    take the simplest tree, this takes the latest epoch, since the learning rate falls. The error is that of the paired
    difference, by Student's t: a few images that happen to be easy don't decide. The loss is calibrated, since
    overconfidence raises the plain loss while the network still learns to separate the classes.

    Args:
        rows: of all epochs so far, see `Row`.
        shapes: input shape of each epoch of the run, from epoch 1.
    """
    best = 0
    for group in _by_shape(rows, shapes):
        fair = [i for i in group if rows[i].get("val_worse") != 1]
        candidates = [rows[i] for i in fair]
        best = max((i for i in fair if not _is_beaten(rows[i], candidates)), default=best)
    return best


def _by_shape(rows: Sequence[Mapping[str, float]], shapes: Sequence[tuple[int, int]]) -> list[list[int]]:
    """The indices of consecutive rows of one input shape."""
    groups = groupby(range(len(rows)), key=lambda i: shapes[max(int(rows[i]["epoch"]), 1) - 1])
    return [list(group) for _, group in groups]


def _is_beaten(row: Mapping[str, float], rows: Sequence[Mapping[str, float]]) -> bool:
    """`val_beaten`; in rows of earlier versions, whether the loss is more than its standard error above the lowest."""
    if not math.isnan(beaten := row.get("val_beaten", math.nan)):
        return beaten == 1
    lowest = min(rows, key=lambda other: other["val_calibrated_loss"])
    return row["val_calibrated_loss"] > lowest["val_calibrated_loss"] + lowest["val_calibrated_loss_error"]


def format_row(rows: Sequence[Mapping[str, float]], shapes: Sequence[tuple[int, int]], is_best: bool) -> str:
    """One line for the last epoch of `rows`; `shapes` as for `select_best`."""
    row, comparable = rows[-1], [rows[i] for i in _by_shape(rows, shapes)[-1]]
    skipped = f"; {count_of(row['skipped'], 'step')} skipped" if row["skipped"] else ""
    trained = f"loss {row['loss']:.3f}, top-1 {row['top1']:.1%}" if row["epoch"] else "before training"
    return (
        f"epoch {row['epoch']:.0f}/{len(shapes)}: {trained}; validation loss "
        f"{row['val_loss']:.3f}, calibrated {row['val_calibrated_loss']:.3f}, top-1 {row['val_top1']:.1%}; "
        f"{row['seconds']:.1f} s{skipped}{_selection(comparable, is_best)}"
    )


def format_no_gain(rows: Sequence[Mapping[str, float]]) -> str:
    """What to print if epoch 0 is selected: why, and what to try."""
    start, *epochs = rows
    lowest = min(epochs, key=lambda row: row["val_calibrated_loss"])
    return (
        f"no epoch is better than the state before training, which is the result: calibrated validation loss "
        f"{start['val_calibrated_loss']:.3f}, top-1 {start['val_top1']:.1%}; the best epoch had "
        f"{lowest['val_calibrated_loss']:.3f}, {lowest['val_top1']:.1%}. Try a tenth of init_lr, or more images"
    )


def _selection(rows: Sequence[Mapping[str, float]], is_best: bool) -> str:
    """Whether the last epoch is the best so far; why, if another one has a lower loss."""
    row = rows[-1]
    if row.get("val_worse") == 1:
        return " (worse than epoch 0)"
    if not is_best or not row["epoch"]:
        return ""
    lowest = min(rows, key=lambda other: other["val_calibrated_loss"])
    if row["val_calibrated_loss"] <= lowest["val_calibrated_loss"]:
        return " (best so far)"
    if lowest.get("val_worse") == 1:
        return f" (best so far: epoch {lowest['epoch']:.0f} is worse than epoch 0 in accuracy)"
    return f" (best so far: the latest within a standard error of epoch {lowest['epoch']:.0f})"
