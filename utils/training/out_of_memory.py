"""Handles batches that don't fit into memory: they are split, and the gradients of the micro-batches are added."""

from __future__ import annotations

import torch


class OutOfMemory(MemoryError):
    """A single image doesn't fit into the device's memory."""


class MicroBatches:
    """The number of micro-batches that a batch is split into, doubled each time memory runs out.

    Attributes:
        count: the current number; it is saved in checkpoints.
    """

    def __init__(self, count: int = 1) -> None:
        self.count = count

    def split_further(self, error: Exception, batch_size: int, step: int, device: torch.device) -> None:
        """Make the micro-batches smaller, to repeat a step that ran out of memory.

        Raises:
            OutOfMemory: they already have one image each.
        """
        if self.count >= batch_size:
            raise OutOfMemory(
                f"{device.type} is out of memory with a single image ({error}): choose a smaller backbone or "
                f"input_shape, or freeze more blocks"
            ) from error
        self.count = min(2 * self.count, batch_size)
        print(
            f"warning: out of memory at step {step + 1}: batches of {batch_size} images are now split into "
            f"{self.count} micro-batches, whose gradients are added"
        )


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error means that memory ran out; only CUDA has a type for it."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return any(text in str(error) for text in ("can't allocate memory", "out of memory"))
