"""What is known of each finished epoch."""

from __future__ import annotations

Row = dict[str, float]
"""One epoch: epoch (from 1), step (updates so far), loss, top1, val_loss, val_top1, val_calibrated_loss (of calibrated
answers), val_calibrated_loss_error (its standard error), learning_rate, skipped (steps left out), seconds, and time (at
its end, in seconds since 1970)."""
