"""Handles steps whose loss or gradient isn't finite: the run stops, or the step is skipped."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from utils.data.loader import batch_paths
from utils.training.epoch import Epoch

CHECK_EVERY = 10
"""Steps between two checks of the losses: each makes the CPU wait for the device."""
MAX_SKIPPED = 20
"""Steps in a row that may be skipped; with more, single images aren't the cause."""
REMEDY = (
    "the run stops; its saved checkpoints are finite. Lower init_lr, set precision to bf16 or fp32, repair the images "
    "if they are the cause, or skip such steps with on_nan=skip"
)


class NonFiniteLoss(FloatingPointError):
    """A loss is infinite or NaN; the message has the step, its learning rate and its images."""


class NonFinitePolicy:
    """Checks losses and gradients.

    Args:
        on_nan: "stop" or "skip", see `TrainConfig.on_nan`.
    """

    def __init__(self, on_nan: Literal["stop", "skip"] = "stop") -> None:
        self.skips = on_nan == "skip"

    def copy_statistics(self, network: nn.Module) -> list[Tensor]:
        """Copies of the buffers before a step that may be skipped: batch norms update theirs in the forward pass."""
        return [buffer.clone() for buffer in network.buffers()] if self.skips else []

    def must_skip(
        self, loss: Tensor, optimizer: Optimizer, scaler: torch.amp.GradScaler, norm: Tensor | None = None
    ) -> bool:
        """Whether to skip this step. An fp16 scaler checks the gradients itself; `norm` is theirs if it is known."""
        if not self.skips:
            return False
        checked = [loss]
        if norm is not None:
            checked.append(norm)
        elif not scaler.is_enabled():
            gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
            checked.append(torch.nn.utils.get_total_norm(gradients, math.inf))
        return not torch.stack(checked).isfinite().all()

    def check(self, epoch: Epoch, step: int, learning_rate: float) -> None:
        """Check the losses every `CHECK_EVERY` steps and at the end of an epoch: raise, or report a skipped step.

        Args:
            epoch: with its last step recorded.
            step: steps of the run so far.
            learning_rate: of the last step.

        Raises:
            NonFiniteLoss: a loss isn't finite, or too many steps in a row were skipped.
        """
        if not self.skips and epoch.done % CHECK_EVERY and epoch.done < epoch.steps:
            return
        first = epoch.done - 1 if self.skips else max(epoch.restored, epoch.done - CHECK_EVERY)
        bad = torch.nonzero(~epoch.losses[first : epoch.done].isfinite()).flatten().tolist()
        if not bad:
            return
        number = first + bad[0]
        message = (
            f"the loss or its gradient isn't finite at step {step - epoch.done + number + 1} (learning rate about "
            f"{learning_rate:.1e}; images: {', '.join(batch_paths(epoch.loader, number))})"
        )
        if not self.skips:
            raise NonFiniteLoss(f"{message}; {REMEDY}")
        print(f"warning: {message}: skipped")
        last = epoch.losses[max(0, epoch.done - MAX_SKIPPED) : epoch.done]
        if not last.isfinite().any() and (len(last) == MAX_SKIPPED or epoch.done == epoch.steps):
            raise NonFiniteLoss(f"{message}; all of the last {len(last)} steps were skipped; {REMEDY}")
