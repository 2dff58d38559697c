"""One training step, one epoch, one evaluation: the same code on every device.

A `network` here takes what the loader gives, as it is, to logits (B, classes):
`utils.modeling.pixel_network.PixelNetwork` takes uint8 pixels (B, 3, height, width),
`utils.training.feature_cache.ThawedPart` the features that a frozen part made of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader
from tqdm import tqdm

from utils.config.train_config import TrainConfig
from utils.data.loader import batch_paths, fetch
from utils.metrics.classification import cross_entropy, top_k_accuracy
from utils.metrics.temperature import calibrated_loss
from utils.modeling.precision import autocast
from utils.system.seeds import derive_seed
from utils.system.signals import defer_signals
from utils.training.ema import WeightEMA
from utils.training.loss import PLAIN, Batch, TrainingLoss, balanced_class_weights
from utils.training.optimizer import set_learning_rate

PRINT_EVERY = 10
"""Steps between two looks at the loss: each makes the processor wait for the device."""


REMEDY = (
    "the run stops, and what was saved before is finite. Lower init_lr, set precision to bf16 or fp32, mend the "
    "images if they are to blame, or leave such steps out, on_nan=skip"
)
MAX_SKIPPED = 20
"""Steps in a row that `on_nan="skip"` leaves out before it gives up: then it isn't the images."""


class OutOfMemory(MemoryError):
    """The device can't work through a single image."""


class NonFiniteLoss(FloatingPointError):
    """The loss became infinite or not a number; the message names the step, its learning rate and its images."""


class Trainer:
    """A network in training.

    Attributes:
        network: inputs to logits, on `device`; a stage may set another.
        device: where it is and where batches go.
        precision: arithmetic of the matrix products: "fp32", "fp16" or "bf16".
        seed: of what is drawn in a step; a step draws the same wherever a run was cut off.
        loss: what a step descends, and how images are mixed before.
        average: of the weights, which then is what is evaluated; None: none.
        on_nan: "stop" or "skip", see `TrainConfig`.
        clip_grad: largest norm of the gradient of all weights together; 0: as large as it is.
        scaler: of the loss, for fp16.
        step: optimizer updates so far.
        micro_batches: into how many parts a batch is split, one after the other, to fit into memory.
        done: steps of the present epoch so far.
        losses: (steps of the epoch,) the loss of each that is done; NaN where it was left out.
        loaded: how many of them are from the process before, which looked at them.
        hits: (steps of the epoch,) the correct predictions in each.
    """

    def __init__(
        self,
        network: nn.Module,
        device: torch.device,
        precision: str,
        seed: int,
        loss: TrainingLoss = PLAIN,
        average: WeightEMA | None = None,
        on_nan: str = "stop",
        clip_grad: float = 0.0,
    ) -> None:
        self.network = network
        self.device = device
        self.precision = precision
        self.seed = seed
        self.loss = loss.to(device)
        self.average = average
        self.on_nan = on_nan
        self.clip_grad = clip_grad
        self.scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
        self.step = 0
        self.micro_batches = 1
        self.start_epoch()

    def start_epoch(self) -> None:
        """Forget the steps of the epoch before."""
        self.done = self.loaded = 0
        self.losses = self.hits = torch.zeros(0, device=self.device)

    @property
    def new_losses(self) -> Tensor:
        """Those of `losses` that are of this process."""
        return self.losses[self.loaded : self.done]

    def train_step(self, inputs: Tensor, targets: Tensor, optimizer: Optimizer) -> tuple[Tensor, Tensor]:
        """One optimizer step on a batch of inputs and class ids (B,), without waiting for the device (but for
        `on_nan="skip"`).

        Where memory doesn't suffice, the batch is split in two, and those again: what is learned from is the same, the
        gradient is their sum.

        Returns:
            The mean loss and the number of correct predictions, as tensors () on the device; a NaN and 0 if the step
            was left out.
        """
        inputs = inputs.to(self.device, non_blocking=True)
        targets = targets.to(self.device, non_blocking=True)
        batch = self.loss.mix(inputs, targets, derive_seed(self.seed, "mix", self.step))
        statistics = [buffer.clone() for buffer in self.network.buffers()] if self.on_nan == "skip" else []
        while (done := self._accumulate_gradient(batch)) is None:
            optimizer.zero_grad(set_to_none=True)
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
        loss, hits = done
        if self.on_nan == "skip" and not self._is_finite(loss, optimizer):
            loss, hits = torch.full_like(loss, math.nan), torch.zeros_like(hits)
            for buffer, before in zip(self.network.buffers(), statistics, strict=True):
                buffer.copy_(before)  # batch norms have taken up what isn't to be learned from
        else:
            if self.clip_grad:
                self.scaler.unscale_(optimizer)
                torch.nn.utils.clip_grad_norm_(self.network.parameters(), self.clip_grad)
            self.scaler.step(optimizer)
            self.scaler.update()
            if self.average:
                self.average.update(self.step)
        optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return loss, hits

    def _accumulate_gradient(self, batch: Batch) -> tuple[Tensor, Tensor] | None:
        """Loss and hits of a batch, with the gradients in place; None if there was too little memory: then it is to be
        tried again, in smaller parts."""
        torch.manual_seed(derive_seed(self.seed, "step", self.step))
        loss, hits = torch.zeros((), device=self.device), torch.zeros((), dtype=torch.int64, device=self.device)
        size = len(batch.class_ids)
        try:
            for part in batch.split(min(self.micro_batches, size)):
                part_loss, part_hits = self._backward(part, size)
                loss += part_loss
                hits += part_hits
            return loss, hits
        except (RuntimeError, MemoryError) as error:
            if not _is_out_of_memory(error):
                raise
            if self.micro_batches >= size:
                raise OutOfMemory(
                    f"{self.device.type} has too little memory for a single image ({error}): choose a smaller "
                    f"backbone or input_shape, or freeze more blocks"
                ) from error
            self.micro_batches = min(2 * self.micro_batches, size)
            print(
                f"warning: out of memory at step {self.step + 1}: batches of {size} images are now worked "
                f"through in {self.micro_batches} parts, whose gradients are added up: they still learn together"
            )
            return None

    def _backward(self, part: Batch, batch_size: int) -> tuple[Tensor, Tensor]:
        """Add the gradient of a part of a batch; its part of the loss and its hits."""
        with autocast(self.device, self.precision):
            logits = self.network(part.inputs)
        loss = self.loss(logits.float(), part).sum() / batch_size
        self.scaler.scale(loss).backward()
        return loss.detach(), (logits.argmax(dim=1) == part.largest).sum()

    def _is_finite(self, loss: Tensor, optimizer: Optimizer) -> bool:
        """Whether loss and gradients are; an fp16 scaler looks at the latter by itself."""
        parts = [loss]
        if not self.scaler.is_enabled():
            gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
            parts.append(torch.nn.utils.get_total_norm(gradients, math.inf))
        return bool(torch.stack(parts).isfinite().all())

    def train_epoch(
        self,
        loader: DataLoader,
        optimizer: Optimizer,
        epoch: int,
        learning_rate: Callable[[float], float],
        after_step: Callable[[], None] = lambda: None,
    ) -> dict[str, float]:
        """What is left of one pass over `loader`: all of it, unless the run was cut off inside this epoch.

        Args:
            loader: from `utils.data.loader.train_loader`.
            optimizer: over the trainable parameters.
            epoch: how many came before, which decides the order of the images and their augmentation.
            learning_rate: from the epochs done so far, fractions included, to the rate of the next step.
            after_step: called after each step.

        Returns:
            `loss` and `top1`, means over the steps of the epoch that weren't left out (of mixed images the class with
            the larger share counts), `learning_rate`, the last one, and `skipped`, steps left out.

        Raises:
            NonFiniteLoss: the loss of a step isn't finite, or those of many in a row.
            WorkerDied: a process that loads images did.
            OutOfMemory: one image is too many.
        """
        self.network.train()
        steps = len(loader)
        self.done = min(self.done, steps)  # a run may go on with a shorter list
        self.loaded = min(self.loaded, self.done)
        self.losses, self.hits = (_lengthen(values[: self.done], steps) for values in (self.losses, self.hits))
        loader.sampler.epoch, loader.sampler.start = epoch, self.done * loader.batch_size
        with tqdm(
            desc=f"epoch {epoch + 1}", total=steps, initial=self.done, unit="step", leave=False, disable=None
        ) as bar:
            for inputs, targets in fetch(loader):
                with defer_signals():
                    rate = learning_rate(epoch + self.done / steps)
                    set_learning_rate(optimizer, rate)
                    self.losses[self.done], self.hits[self.done] = self.train_step(inputs, targets, optimizer)
                    self.done += 1
                    if self.on_nan == "skip" or self.done % PRINT_EVERY == 0 or self.done == steps:
                        self._check_losses(loader, rate)
                        bar.set_postfix(loss=f"{self._mean_loss():.3f}", lr=f"{rate:.1e}")
                    after_step()
                bar.update()
        last_rate = learning_rate(epoch + (steps - 1) / steps)
        set_learning_rate(optimizer, last_rate)  # as the last step left it, should that have been in an earlier process
        skipped = int(self.losses.isnan().sum())
        return {
            "loss": self._mean_loss(),
            "top1": self.hits.sum().item() / max(1, (steps - skipped) * loader.batch_size),
            "learning_rate": last_rate,
            "skipped": skipped,
        }

    def _mean_loss(self) -> float:
        return self.losses[: self.done].nanmean().item()

    def _check_losses(self, loader: DataLoader, learning_rate: float) -> None:
        """Look whether the losses since the last look are finite, and say what is wrong if not."""
        skip = self.on_nan == "skip"  # then every step is looked at
        first = self.done - 1 if skip else max(self.loaded, self.done - PRINT_EVERY)
        bad = torch.nonzero(~self.losses[first : self.done].isfinite()).flatten().tolist()
        if not bad:
            return
        number = first + bad[0]
        paths = batch_paths(loader, number)
        told = (
            f"the loss or its gradient isn't finite at step {self.step - self.done + number + 1} (learning rate about "
            f"{learning_rate:.1e}; its images: {', '.join(paths)})"
        )
        if not skip:
            raise NonFiniteLoss(f"{told}; {REMEDY}")
        print(f"warning: {told}: left out")
        last = self.losses[max(0, self.done - MAX_SKIPPED) : self.done]
        if not last.isfinite().any() and (len(last) == MAX_SKIPPED or self.done == len(self.losses)):
            raise NonFiniteLoss(f"{told}, as were the {len(last)} steps up to it; {REMEDY}")

    def evaluated_weights(self) -> AbstractContextManager:
        """A context within which the network has the weights that are evaluated: their average, if there is one."""
        return self.average.in_place() if self.average else nullcontext()

    def validate(self, loader: DataLoader) -> dict[str, float]:
        """`val_loss` and `val_top1` over every image of `loader`, and the loss that calibrated answers would have,
        with its standard error.

        Raises:
            NonFiniteLoss: the loss isn't finite.
        """
        with self.evaluated_weights():
            logits, targets = compute_logits(
                self.network, loader, self.device, self.precision, "validating", self.micro_batches
            )
        loss = cross_entropy(logits, targets)
        # Logits that have overflowed for wrong classes alone leave the plain loss finite.
        calibrated, error = calibrated_loss(logits, targets) if math.isfinite(loss) else (loss, loss)
        if not math.isfinite(calibrated):
            raise NonFiniteLoss(f"the validation loss is {calibrated} after step {self.step}; {REMEDY}")
        return {
            "val_loss": loss,
            "val_top1": top_k_accuracy(logits, targets, 1),
            "val_calibrated_loss": calibrated,
            "val_calibrated_loss_error": error,
        }

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint holds of the trainer besides the weights."""
        return {
            "step": self.step,
            "scaler": self.scaler.state_dict(),
            "micro_batches": self.micro_batches,
            "epoch_losses": self.losses[: self.done].cpu(),
            "epoch_hits": self.hits[: self.done].cpu(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what `state_dict` gave."""
        self.step, self.micro_batches = state["step"], state["micro_batches"]
        if state["scaler"]:  # there is none if another device had no use for it
            self.scaler.load_state_dict(state["scaler"])
        self.done = self.loaded = len(state["epoch_losses"])
        self.losses, self.hits = state["epoch_losses"].to(self.device), state["epoch_hits"].to(self.device)


def make_trainer(
    config: TrainConfig,
    network: nn.Module,
    precision: str,
    class_ids: np.ndarray,
    resumed: Mapping[str, Any] | None = None,
) -> Trainer:
    """What trains `network`, of `utils.modeling.pixel_network.PixelNetwork`, with the loss and the average of the
    weights that `config` asks for.

    Args:
        config: the settings.
        network: where it shall be trained.
        precision: "fp32", "fp16" or "bf16".
        class_ids: (n,), of the training images, for a loss that is balanced by them.
        resumed: the checkpoint that the run goes on from.
    """
    model = network.model
    weights = balanced_class_weights(class_ids, model.head.out_features) if config.class_weights == "balanced" else None
    loss = TrainingLoss(weights, config.label_smoothing, config.mixup, config.cutmix)
    average = WeightEMA(model, config.ema_decay) if config.ema_decay else None
    if average and resumed:
        average.load(resumed["weights"])
    device = next(model.parameters()).device
    return Trainer(network, device, precision, config.seed, loss, average, config.on_nan, config.clip_grad)


def _lengthen(values: Tensor, length: int) -> Tensor:
    return torch.cat([values, values.new_zeros(length - len(values))])


def _is_out_of_memory(error: BaseException) -> bool:
    """Whether it is what a device, or the processor, raises for lack of memory; only CUDA has a type for it."""
    told = str(error)
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(
        words in told for words in ("can't allocate memory", "out of memory")
    )


@torch.inference_mode()
def compute_logits(
    network: nn.Module,
    loader: DataLoader,
    device: torch.device,
    precision: str,
    title: str = "evaluating",
    micro_batches: int = 1,
) -> tuple[Tensor, Tensor]:
    """Logits (N, classes) in fp32 and class ids (N,) of every image of `loader`, in its order, on the CPU. Batches go
    through the network in so many parts."""
    network.eval()
    logits, targets = [], []
    bar = tqdm(fetch(loader), desc=title, total=len(loader), unit="batch", leave=False, disable=None)
    for inputs, batch_targets in bar:
        for part in inputs.to(device, non_blocking=True).tensor_split(min(micro_batches, len(inputs))):
            with autocast(device, precision):
                logits.append(network(part).float())
        targets.append(batch_targets)
    return torch.cat(logits).cpu(), torch.cat(targets)
