"""The log of a run: TensorBoard events, tables and curves."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from PIL import Image
from torch import Tensor, nn
from torchvision.utils import make_grid

from utils.runs.folder import EVENTS
from utils.runs.history import Row
from utils.system.csv_text import csv_row
from utils.system.files import try_unlink, write_text, write_whole

EPOCHS, AUGMENTED = "epochs.csv", "augmented.png"
DRAW_EVERY = 10.0
"""Minimum number of seconds between two plots: plotting may take as long as a short epoch."""


class RunLog:
    """The log of a run in its folder: TensorBoard events, the losses as tables, and a plot.

    Everything is rewritten from `history`, the epochs so far, when a run is resumed, so there are no gaps and no
    duplicate points. A log that can't be written causes a warning only.
    """

    def __init__(self, folder: Path, history: Sequence[Row]) -> None:
        from torch.utils.tensorboard import SummaryWriter  # not needed by DataLoader workers

        self.folder = folder
        older = list(folder.glob(f"{EVENTS}*"))
        self.writer = SummaryWriter(str(folder))
        for row in history:
            self._add_scalars(row)
        self.writer.flush()
        for path in older:
            try_unlink(path, "TensorBoard shows its curves twice")
        self._undrawn = history
        self._drawn_at = time.monotonic()

    def _add_scalars(self, row: Row) -> None:
        for name, value in row.items():
            if name not in ("step", "time") and math.isfinite(value):
                self.writer.add_scalar(name, value, row["step"], walltime=row["time"])

    @contextmanager
    def _warn_on_error(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            print(f"warning: the log in {self.folder} can't be written ({error.strerror})")

    def log_images(self, network: nn.Module, pixels: Tensor) -> None:
        """Log training images (B, 3, height, width) uint8, also as `augmented.png`, and the graph of `network`."""
        with self._warn_on_error():
            grid = make_grid(pixels[:16], nrow=4, padding=4, pad_value=255)  # (3, height, width)
            with write_whole(self.folder / AUGMENTED) as file:
                Image.fromarray(grid.permute(1, 2, 0).numpy()).save(file, format="png")
        try:
            with self._warn_on_error(), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # tracing warns of every shape used in Python code
                self.writer.add_images("train/augmented", pixels[:16], 0)
                self.writer.add_graph(network.eval(), pixels[:1].to(next(network.parameters()).device))
        except RuntimeError as error:
            print(f"warning: the graph of the network isn't logged, torch can't trace it ({error!s:.80})")

    def log_epoch(self, history: Sequence[Row]) -> None:
        """Log the last row of `history`."""
        with self._warn_on_error():
            self._add_scalars(history[-1])
            self.writer.flush()
            for name, key in (("epoch_loss.txt", "loss"), ("epoch_val_loss.txt", "val_loss")):
                write_text(self.folder / name, "".join(f"{row[key]}\n" for row in history if row["epoch"]))
            names = list(history[-1])
            rows = [names, *([row.get(name, math.nan) for name in names] for row in history)]
            write_text(self.folder / EPOCHS, "".join(f"{csv_row(list(row))}\r\n" for row in rows))
            self._undrawn = history
            if time.monotonic() - self._drawn_at >= DRAW_EVERY:
                self._draw()

    def _draw(self) -> None:
        from utils.runs.curves import plot_losses  # needs matplotlib

        with write_whole(self.folder / "epoch_loss.png") as file:
            plot_losses(self._undrawn).savefig(file, format="png")
        self._undrawn, self._drawn_at = (), time.monotonic()

    def close(self) -> None:
        """Finish the event file and the plot."""
        with self._warn_on_error():
            self.writer.close()
            if self._undrawn:
                self._draw()
