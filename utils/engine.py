"""One training step, one epoch, one evaluation: the same code on every device.

A `network` here takes what the loader gives, as it is, to logits (B, classes): `utils.classifier.pixel_network` takes
uint8 pixels (B, 3, height, width), `utils.freeze.ThawedPart` the features (B, N, C) that a frozen part made of them.
"""

from __future__ import annotations

import math
import platform
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader
from tqdm import tqdm

from utils.metrics import cross_entropy, top_k_accuracy
from utils.optim import set_learning_rate
from utils.seeds import derive_seed

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

PRINT_EVERY = 10
"""Steps between two looks at the loss: each makes the processor wait for the device."""


REMEDY = (
    "the run stops, and the checkpoints of the epochs before are in place. Lower init_lr, or set precision to bf16 or "
    "fp32"
)


class NonFiniteLoss(FloatingPointError):
    """The loss became infinite or not a number; the message names the step."""


def pick_device(name: str) -> torch.device:
    """The device called `name`; "auto" is CUDA, else Apple's GPU, else the processor.

    Raises:
        ValueError: that device isn't there.
    """
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(kind for kind, there in available.items() if there)
    if not available.get(name):
        raise ValueError(f"device={name!r}: torch finds none on this machine; set device to auto or cpu")
    return torch.device(name)


def choose_precision(precision: str, device: torch.device) -> tuple[str, str]:
    """The arithmetic for `precision` on `device`, "fp32", "fp16" or "bf16", and why.

    "auto" is the fastest that learns as well as fp32. "bf16" becomes "fp32" on a processor that would only emulate it,
    at a tenth of the speed.
    """
    has_bf16 = _has_bf16(device)
    if precision == "auto":
        if has_bf16:
            return "bf16", f"this {device.type} device has it in hardware"
        if device.type == "cuda" and torch.cuda.get_device_capability(device) >= (7, 0):
            return "fp16", "this GPU has it in hardware, and no bf16"
        return "fp32", f"this {device.type} device has nothing faster that torch uses"
    if precision == "bf16" and device.type == "cpu" and not has_bf16:
        return "fp32", "this processor has no bf16"
    return precision, "as set"


def _has_bf16(device: torch.device) -> bool:
    """Whether `device` multiplies bf16 in hardware."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu":
        return False
    if platform.machine().lower() in ("x86_64", "amd64"):
        return torch.cpu._is_avx512_bf16_supported()
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()  # Arm's BFMMLA, by the library that would use it


def tune_kernels(device: torch.device, convolutional: bool) -> None:
    """Let CUDA's fp32 products run on tensor cores, in TF32, and cuDNN try its convolutions out.

    Trying them out takes pictures of one size, which a run has, and costs seconds; of a transformer's one convolution
    nothing is gained by it.
    """
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.benchmark = convolutional


def autocast(device: torch.device, precision: str) -> AbstractContextManager:
    """The context in which matrix products are done in `precision` ("fp32", "fp16" or "bf16")."""
    if precision == "fp32":
        return nullcontext()
    return torch.autocast(device.type, DTYPES[precision])


class Trainer:
    """A network in training.

    Attributes:
        network: inputs to logits, on `device`; a stage may set another.
        device: where it is and where batches go.
        precision: "fp32", "fp16" (with a loss scaler) or "bf16".
        seed: with the step it decides what dropout and stochastic depth draw.
        class_weights: (classes,) of the training loss, or None.
        scaler: the loss scaler; does nothing but in fp16.
        step: optimizer updates so far.
    """

    def __init__(
        self,
        network: nn.Module,
        device: torch.device,
        precision: str,
        seed: int,
        class_weights: Tensor | None = None,
    ) -> None:
        self.network = network
        self.device = device
        self.precision = precision
        self.seed = seed
        self.class_weights = None if class_weights is None else class_weights.to(device)
        self.scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
        self.step = 0

    def train_step(self, inputs: Tensor, targets: Tensor, optimizer: Optimizer) -> tuple[Tensor, Tensor]:
        """One update from a batch of what the network takes and class ids (B,), without waiting for the device.

        Returns:
            The mean loss and the number of correct predictions, as tensors () on the device.
        """
        torch.manual_seed(derive_seed(self.seed, "step", self.step))
        inputs = inputs.to(self.device, non_blocking=True)
        targets = targets.to(self.device, non_blocking=True)
        with autocast(self.device, self.precision):
            logits = self.network(inputs)
        losses = F.cross_entropy(logits.float(), targets, reduction="none")
        if self.class_weights is not None:
            losses = losses * self.class_weights[targets]  # their mean over the list is 1, so the mean is a plain one
        loss = losses.mean()
        self.scaler.scale(loss).backward()
        self.scaler.step(optimizer)
        self.scaler.update()
        optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return loss.detach(), (logits.argmax(dim=1) == targets).sum()

    def train_epoch(
        self, loader: DataLoader, optimizer: Optimizer, epoch: int, learning_rate: Callable[[float], float]
    ) -> dict[str, float]:
        """One pass over `loader`.

        Args:
            loader: from `utils.data.train_loader`.
            optimizer: over the trainable parameters.
            epoch: how many came before, which decides the order of the pictures and their augmentation.
            learning_rate: from the epochs done so far, fractions included, to the rate of the next step.

        Returns:
            `loss` and `top1`, means over the epoch, and `learning_rate`, the last one.

        Raises:
            NonFiniteLoss: the loss of a step isn't finite.
        """
        self.network.train()
        loader.sampler.epoch = epoch
        losses = torch.zeros(len(loader), device=self.device)
        correct = torch.zeros((), device=self.device)
        pictures = 0
        first_step = self.step
        with tqdm(loader, desc=f"epoch {epoch + 1}", unit="step", leave=False, disable=None) as bar:
            for i, (inputs, targets) in enumerate(bar):
                rate = learning_rate(epoch + i / len(loader))
                set_learning_rate(optimizer, rate)
                losses[i], hits = self.train_step(inputs, targets, optimizer)
                correct += hits
                pictures += len(targets)
                if (i + 1) % PRINT_EVERY == 0 or i + 1 == len(loader):
                    _check_finite(losses[: i + 1], first_step, rate)
                    means = {"loss": losses[: i + 1].mean().item(), "top1": correct.item() / pictures}
                    bar.set_postfix(loss=f"{means['loss']:.3f}", top1=f"{means['top1']:.3f}", lr=f"{rate:.1e}")
        return means | {"learning_rate": rate}

    def validate(self, loader: DataLoader) -> dict[str, float]:
        """`val_loss` and `val_top1` over every picture of `loader`.

        Raises:
            NonFiniteLoss: the loss isn't finite.
        """
        logits, targets = compute_logits(self.network, loader, self.device, self.precision, "validating")
        loss = cross_entropy(logits, targets)
        if not math.isfinite(loss):
            raise NonFiniteLoss(f"the validation loss is {loss} after step {self.step}; {REMEDY}")
        return {"val_loss": loss, "val_top1": top_k_accuracy(logits, targets, 1)}

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint holds of the trainer besides the weights."""
        return {"step": self.step, "scaler": self.scaler.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what `state_dict` gave."""
        self.step = state["step"]
        self.scaler.load_state_dict(state["scaler"])


def _check_finite(losses: Tensor, first_step: int, learning_rate: float) -> None:
    bad = torch.nonzero(~losses.isfinite())
    if len(bad):
        raise NonFiniteLoss(
            f"the loss is {losses[bad[0]].item()} at step {first_step + bad[0].item() + 1} (learning rate about "
            f"{learning_rate:.1e}); {REMEDY}"
        )


@torch.inference_mode()
def compute_logits(
    network: nn.Module, loader: DataLoader, device: torch.device, precision: str, title: str = "evaluating"
) -> tuple[Tensor, Tensor]:
    """Logits (N, classes) in fp32 and class ids (N,) of every picture of `loader`, in its order, on the CPU."""
    network.eval()
    logits, targets = [], []
    for inputs, batch_targets in tqdm(loader, desc=title, unit="batch", leave=False, disable=None):
        with autocast(device, precision):
            logits.append(network(inputs.to(device, non_blocking=True)).float())
        targets.append(batch_targets)
    return torch.cat(logits).cpu(), torch.cat(targets)
