"""One pass over the training images: its remaining batches, and the loss and hits of its steps."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from utils.data.loader import iterate_batches

SHOW_EVERY = 10
"""Steps between updates of the loss in the progress bar: each makes the CPU wait for the device."""


class Epoch:
    """An epoch in progress; an interrupted one continues after its last step.

    Attributes:
        number: epochs of the run before this one.
        done: steps so far.
        restored: steps restored from a checkpoint, whose losses are already checked.
        losses: (steps of the epoch,), loss of each step that is done; NaN if it was skipped.
        hits: (steps of the epoch,), correct predictions of each step.
    """

    def __init__(self, device: torch.device) -> None:
        self.number = 0
        self.done = self.restored = 0
        self.losses = self.hits = torch.zeros(0, device=device)

    def start(self, loader: DataLoader, number: int) -> Epoch:
        """Take the remaining batches from `loader`, see `utils.data.loader.train_loader`."""
        self.number = number
        self.loader = loader
        self.done = min(self.done, self.steps)  # a resumed run may have a shorter list
        self.restored = min(self.restored, self.done)
        self.losses, self.hits = (_lengthen(values[: self.done], self.steps) for values in (self.losses, self.hits))
        loader.batch_sampler.epoch, loader.batch_sampler.start = number, self.done
        return self

    @property
    def steps(self) -> int:
        """Number of steps of the whole epoch."""
        return len(self.loader)

    @property
    def position(self) -> float:
        """Epochs before the next step, as a float."""
        return self.number + self.done / self.steps

    @property
    def last_position(self) -> float:
        """Epochs of the run before the last step of this epoch."""
        return self.number + (self.steps - 1) / self.steps

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the remaining batches, with a progress bar; call `record` after each.

        Raises:
            WorkerDied: a DataLoader worker died.
        """
        title = f"epoch {self.number + 1}"
        with tqdm(desc=title, total=self.steps, initial=self.done, unit="step", leave=False, disable=None) as bar:
            for batch in iterate_batches(self.loader):
                yield batch
                if self.done % SHOW_EVERY == 0 and not bar.disable:
                    bar.set_postfix(loss=f"{self.mean_loss():.3f}")
                bar.update()

    def record(self, loss: Tensor, hits: Tensor) -> None:
        """Record the loss and the number of correct predictions of a step, tensors () on the device."""
        self.losses[self.done], self.hits[self.done] = loss, hits
        self.done += 1

    def mean_loss(self) -> float:
        """Mean over the steps so far, without skipped ones."""
        return self.losses[: self.done].nanmean().item()

    def summary(self) -> dict[str, float]:
        """Means of `loss` and `top1` (for mixed images, of the class with the larger share) without skipped steps, and
        `skipped`, their number."""
        skipped = int(self.losses.isnan().sum())
        images = max(1, (self.steps - skipped) * self.loader.batch_sampler.batch_size)
        return {"loss": self.mean_loss(), "top1": self.hits.sum().item() / images, "skipped": skipped}

    @property
    def new_losses(self) -> Tensor:
        """The losses of the steps of this process."""
        return self.losses[self.restored : self.done]

    def state_dict(self) -> dict[str, Tensor]:
        """The state for a checkpoint."""
        return {"epoch_losses": self.losses[: self.done].cpu(), "epoch_hits": self.hits[: self.done].cpu()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore a state."""
        device = self.losses.device
        self.done = self.restored = len(state["epoch_losses"])
        self.losses, self.hits = state["epoch_losses"].to(device), state["epoch_hits"].to(device)


def _lengthen(values: Tensor, length: int) -> Tensor:
    return torch.cat([values, values.new_zeros(length - len(values))])
