"""Handles batches that don't fit into memory: they are split, and the gradients of the micro-batches are added."""

from __future__ import annotations

import torch


class OutOfMemory(MemoryError):
    """A single image doesn't fit into the device's memory."""


class MicroBatches:
    """The number of micro-batches that a part of a batch is split into, doubled each time memory runs out.

    Attributes:
        count: the current number; it is saved in checkpoints.
    """

    def __init__(self, count: int = 1) -> None:
        self.count = count
        self._error: Exception | None = None

    def note(self, error: Exception) -> None:
        """Remember that memory ran out; raise any other error."""
        if not is_out_of_memory(error):
            raise error
        self._error = error

    def split_further(self, size: int, step: int, device: torch.device) -> None:
        """Make the micro-batches of `size` images smaller, to repeat a step for which a rank had too little memory.

        Raises:
            OutOfMemory: they already have one image each.
        """
        if self.count >= size:
            raise OutOfMemory(
                f"{device.type} is out of memory with a single image ({self._error or 'of another process'}): choose a "
                f"smaller backbone or input_shape, or freeze more blocks"
            ) from self._error
        self.count = min(2 * self.count, size)
        print(
            f"warning: out of memory at step {step + 1}: batches of {size} images are now split into "
            f"{self.count} micro-batches, whose gradients are added"
        )


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error means that memory ran out; only CUDA has a type for it."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return any(text in str(error) for text in ("can't allocate memory", "out of memory"))
