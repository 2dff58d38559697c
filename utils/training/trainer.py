"""Training step and validation."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from utils.config.train_config import TrainConfig
from utils.data.preprocessing import Preprocessing
from utils.metrics.classification import cross_entropy, top_k_accuracy
from utils.metrics.temperature import calibrated_loss
from utils.modeling.build import BuiltNetwork, build_network
from utils.modeling.pixel_network import PixelNetwork
from utils.modeling.precision import autocast
from utils.system.seeds import derive_seed
from utils.training.datasets import Data
from utils.training.ema import WeightEMA
from utils.training.epoch import Epoch
from utils.training.loss import CROSS_ENTROPY, Batch, TrainingLoss, balanced_class_weights
from utils.training.non_finite import REMEDY, NonFiniteLoss, NonFinitePolicy
from utils.training.out_of_memory import MicroBatches, is_out_of_memory
from utils.training.predict_logits import predict_logits


class Trainer:
    """Takes training steps and validates the network.

    Attributes:
        network: inputs of the loader to logits (B, classes), on `device`: a `PixelNetwork`, or a `ThawedPart` on cached
            features.
        device: batches are moved there.
        precision: of matrix products, "fp32", "fp16" or "bf16".
        seed: random numbers of a step depend only on it and on the number of the step.
        loss: loss function, and the mixing of images before it.
        ema: exponential moving average of the weights, which is evaluated and saved; None: no EMA.
        clip_grad: largest norm of the gradient of all weights; 0: no limit.
        non_finite: policy for losses that aren't finite.
        micro_batches: policy for batches that don't fit into memory.
        scaler: loss scaler for fp16.
        epoch: the epoch in progress.
        step: optimizer steps so far.
    """

    def __init__(
        self,
        network: nn.Module,
        device: torch.device,
        precision: str,
        seed: int,
        loss: TrainingLoss = CROSS_ENTROPY,
        ema: WeightEMA | None = None,
        on_nan: str = "stop",
        clip_grad: float = 0.0,
    ) -> None:
        self.network = network
        self.device = device
        self.precision = precision
        self.seed = seed
        self.loss = loss.to(device)
        self.ema = ema
        self.clip_grad = clip_grad
        self.non_finite = NonFinitePolicy(on_nan)
        self.micro_batches = MicroBatches()
        self.scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
        self.epoch = Epoch(device)
        self.step = 0

    def train_step(self, inputs: Tensor, targets: Tensor, optimizer: Optimizer) -> tuple[Tensor, Tensor]:
        """Take one optimizer step on a batch of inputs and class ids (B,).

        It doesn't wait for the device, except to decide whether to skip a step.

        Returns:
            The mean loss and the number of correct predictions, tensors () on the device; NaN and 0 if the step was
            skipped.
        """
        inputs = inputs.to(self.device, non_blocking=True)
        targets = targets.to(self.device, non_blocking=True)
        batch = self.loss.mix(inputs, targets, derive_seed(self.seed, "mix", self.step))
        statistics = self.non_finite.copy_statistics(self.network)
        while True:
            try:
                loss, hits = self._accumulate_gradients(batch)
                break
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                self.micro_batches.split_further(error, len(batch.class_ids), self.step, self.device)
            optimizer.zero_grad(set_to_none=True)
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
        if self.non_finite.must_skip(loss, optimizer, self.scaler):
            loss, hits = torch.full_like(loss, math.nan), torch.zeros_like(hits)
            for buffer, before in zip(self.network.buffers(), statistics, strict=True):
                buffer.copy_(before)
        else:
            if self.clip_grad:
                self.scaler.unscale_(optimizer)
                torch.nn.utils.clip_grad_norm_(self.network.parameters(), self.clip_grad)
            self.scaler.step(optimizer)
            self.scaler.update()
            if self.ema:
                self.ema.update(self.step)
        optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return loss, hits

    def _accumulate_gradients(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Add the gradients of all micro-batches; return mean loss and number of correct predictions of the batch."""
        torch.manual_seed(derive_seed(self.seed, "step", self.step))
        total, hits = torch.zeros((), device=self.device), torch.zeros((), dtype=torch.int64, device=self.device)
        size = len(batch.class_ids)
        for micro_batch in batch.split(min(self.micro_batches.count, size)):
            with autocast(self.device, self.precision):
                logits = self.network(micro_batch.inputs)
            loss = self.loss(logits.float(), micro_batch).sum() / size
            self.scaler.scale(loss).backward()
            total += loss.detach()
            hits += (logits.argmax(dim=1) == micro_batch.main_class_ids).sum()
        return total, hits

    def start_epoch(self, loader: DataLoader, number: int) -> Epoch:
        """Start epoch `number`, counted from 0, or continue it after its last step."""
        self.network.train()
        return self.epoch.start(loader, number)

    def finish_epoch(self) -> None:
        """Prepare for the next epoch."""
        self.epoch = Epoch(self.device)

    def evaluated_weights(self) -> AbstractContextManager:
        """Use the weights that are evaluated within this context: the EMA, if there is one."""
        return self.ema.swapped_in() if self.ema else nullcontext()

    def validate(self, loader: DataLoader) -> dict[str, float]:
        """Compute loss and accuracy over all images of `loader`, and the loss after temperature scaling with its
        standard error.

        Raises:
            NonFiniteLoss: the loss isn't finite.
        """
        with self.evaluated_weights():
            logits, targets = predict_logits(
                self.network, loader, self.device, self.precision, "validating", self.micro_batches.count
            )
        loss = cross_entropy(logits, targets)
        # The plain loss is finite even if logits of wrong classes overflow to -inf.
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
        """The state for a checkpoint, without the weights."""
        return {
            "step": self.step,
            "scaler": self.scaler.state_dict(),
            "micro_batches": self.micro_batches.count,
            **self.epoch.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a state."""
        self.step, self.micro_batches.count = state["step"], state["micro_batches"]
        if state["scaler"]:  # empty if the scaler wasn't enabled
            self.scaler.load_state_dict(state["scaler"])
        self.epoch.load_state_dict(state)


def build_trainer(
    config: TrainConfig, data: Data, device: torch.device, precision: str, resumed: dict[str, Any] | None = None
) -> tuple[Trainer, BuiltNetwork]:
    """Build network, loss, EMA and trainer from `config`, in the state of the checkpoint `resumed` if there is one."""
    built = build_network(config, data.class_names, resumed)
    config, model = built.config, built.model
    network = PixelNetwork(model, Preprocessing.from_config(config), device)
    class_ids = data.train_images.class_ids
    weights = balanced_class_weights(class_ids, len(data.class_names)) if config.class_weights == "balanced" else None
    if weights is not None and (weights[weights > 0] == 1).all():
        print("class_weights=balanced: changes nothing, since all classes have equally many training images")
    loss = TrainingLoss(weights, config.label_smoothing, config.mixup, config.cutmix)
    ema = WeightEMA(model, config.ema_decay) if config.ema_decay else None
    if ema and resumed:
        ema.load(resumed["weights"])
    trainer = Trainer(network, device, precision, config.seed, loss, ema, config.on_nan, config.clip_grad)
    if resumed:
        trainer.load_state_dict(resumed)
    return trainer, built
