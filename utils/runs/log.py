"""The log of a run: TensorBoard events, the losses as text, and their curve."""

from __future__ import annotations

import csv
import time
import warnings
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor, nn

from utils.runs.folder import EVENTS
from utils.runs.history import Row
from utils.system.files import try_unlink

EPOCHS = "epochs.csv"
DRAW_EVERY = 10.0
"""Seconds between two drawings of the curve, at least: each takes a part of a second, as long as an epoch on a GPU."""


class RunLog:
    """The log of a run in its folder: TensorBoard events, the losses as text, and their curve.

    All of it is made from the history, at each epoch (the curve not as often, if they are short) and anew when a run
    goes on, so that there is no gap and no doubled point, wherever it was cut off.

    Args:
        folder: the run's folder.
        history: the epochs so far.
    """

    def __init__(self, folder: Path, history: Sequence[Row]) -> None:
        from torch.utils.tensorboard import SummaryWriter  # not for the workers that load images

        self.folder = folder
        older = list(folder.glob(f"{EVENTS}*"))
        self.writer = SummaryWriter(str(folder))
        for row in history:
            self._add_scalars(row)
        self.writer.flush()
        for path in older:
            try_unlink(path, "its curves are shown twice")
        self._undrawn = history
        self._drawn_at = time.monotonic()

    def _add_scalars(self, row: Row) -> None:
        for name, value in row.items():
            if name not in ("step", "time"):
                self.writer.add_scalar(name, value, row["step"], walltime=row["time"])

    def log_images(self, network: nn.Module, pixels: Tensor) -> None:
        """Show TensorBoard some training images (B, 3, height, width) uint8, and the graph of `network`."""
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
        with (self.folder / EPOCHS).open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, history[-1].keys())
            writer.writeheader()
            writer.writerows(history)
        self._undrawn = history
        if time.monotonic() - self._drawn_at >= DRAW_EVERY:
            self._draw()

    def _draw(self) -> None:
        from utils.runs.curves import plot_losses  # not for the workers either

        plot_losses(self._undrawn).savefig(self.folder / "epoch_loss.png")
        self._undrawn, self._drawn_at = (), time.monotonic()

    def close(self) -> None:
        """Finish the event file and the curve."""
        self.writer.close()
        if self._undrawn:
            self._draw()
