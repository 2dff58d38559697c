"""The results of finished epochs."""

from __future__ import annotations

from collections.abc import Mapping

from utils.system.text import count_of

COLUMNS = (
    *("epoch", "step", "loss", "top1", "val_loss", "val_top1", "val_calibrated_loss", "val_calibrated_loss_error"),
    *("learning_rate", "skipped", "seconds", "time"),
)
Row = dict[str, float]
"""One epoch: epoch (from 1), step (optimizer steps so far), loss, top1, val_loss, val_top1, val_calibrated_loss (after
temperature scaling), val_calibrated_loss_error (its standard error), learning_rate, skipped (steps), seconds, time (its
end, Unix time)."""


def format_row(row: Mapping[str, float], epochs: int, is_best: bool) -> str:
    """One line for an epoch."""
    skipped = f"; {count_of(row['skipped'], 'step')} skipped" if row["skipped"] else ""
    return (
        f"epoch {row['epoch']}/{epochs}: loss {row['loss']:.3f}, top-1 {row['top1']:.1%}; validation loss "
        f"{row['val_loss']:.3f}, calibrated {row['val_calibrated_loss']:.3f}, top-1 {row['val_top1']:.1%}; "
        f"{row['seconds']:.1f} s{skipped}{' (best so far)' if is_best else ''}"
    )
