"""What happens when a batch doesn't fit into memory: it is split, and the gradients of its parts are added."""

from __future__ import annotations

import torch


class OutOfMemory(MemoryError):
    """A single image doesn't fit into the device's memory."""


class MicroBatches:
    """How many micro-batches a batch is split into; twice as many after each lack of memory.

    Attributes:
        count: at the moment; a checkpoint keeps it.
    """

    def __init__(self, count: int = 1) -> None:
        self.count = count

    def split_further(self, error: Exception, batch_size: int, step: int, device: torch.device) -> None:
        """Prepare for another attempt at a step that failed for lack of memory, with smaller micro-batches.

        Raises:
            OutOfMemory: they have one image each already.
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
    """Whether a device or the CPU raises this for lack of memory; only CUDA has a type for it."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return any(words in str(error) for words in ("can't allocate memory", "out of memory"))
