"""Training step and validation."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from nets.network import FreezableNetwork
from utils.config.train_config import TrainConfig
from utils.data.preprocessing import Preprocessing
from utils.metrics.classification import cross_entropy, top_k_accuracy
from utils.metrics.paired import ONE_ERROR, is_higher, is_worse
from utils.metrics.temperature import calibrated_losses
from utils.modeling.build import BuiltNetwork, build_network
from utils.modeling.pixel_network import PixelNetwork
from utils.modeling.precision import autocast
from utils.system.runtime import runtime
from utils.system.seeds import derive_seed
from utils.system.signals import agree_on_requests, own_requests
from utils.training.datasets import Data
from utils.training.ema import WeightEMA
from utils.training.epoch import Epoch
from utils.training.loss import CROSS_ENTROPY, Batch, TrainingLoss, balanced_class_weights
from utils.training.non_finite import CHECK_EVERY, REMEDY, NonFiniteLoss, NonFinitePolicy
from utils.training.out_of_memory import MicroBatches, OutOfMemory
from utils.training.parts import Parts, PartSums, adds_exactly, running_statistics
from utils.training.predict_logits import predict_logits
from utils.training.sharding import must_shard, norm_by_rows, scale_gradients, shard_network


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
        parts: the parts of each global batch that this rank computes.
        exact: whether gradients are added in an order that doesn't depend on the number of ranks; otherwise several
            ranks need a `network` in `DistributedDataParallel`.
        by_rows: whether the norm of gradients is computed by `norm_by_rows`.
        sharded: whether the weights are divided between the ranks.
        non_finite: policy for losses that aren't finite.
        micro_batches: policy for batches that don't fit into memory.
        scaler: loss scaler for fp16.
        epoch: the epoch in progress.
        start: losses and correct, (N,) each, of the validation before the first step; empty: there was none.
        lowest: the same of the validation with the lowest mean loss so far, without those that are worse than the
            start; empty: there was none at this input shape.
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
        parts: Parts = Parts(),  # noqa: B008, immutable
        exact: bool = True,
        by_rows: bool = False,
    ) -> None:
        self.network = network
        self.device = device
        self.precision = precision
        self.seed = seed
        self.loss = loss.to(device)
        self.ema = ema
        self.clip_grad = clip_grad
        self.parts = parts
        self.exact = exact
        self.by_rows = by_rows
        self.sharded = False
        self.non_finite = NonFinitePolicy(on_nan)
        self.micro_batches = MicroBatches()
        self.scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
        self._requests = torch.zeros(3, device=device)
        self.epoch = Epoch(device)
        self.start: dict[str, Tensor] = {}
        self.lowest: dict[str, Tensor] = {}
        self.step = 0

    def train_step(
        self, inputs: Tensor, targets: Tensor, optimizer: Optimizer, batch_size: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Take one optimizer step on a global batch, of which `inputs` and class ids `targets` (B,) are the rows of
        this rank.

        It doesn't wait for the device, except to decide whether to skip a step, and where ranks have to agree.

        Args:
            batch_size: rows of the global batch; None: B, there is only this rank.

        Returns:
            The mean loss and the number of correct predictions of the global batch, tensors () on the device; NaN and 0
            if the step was skipped.
        """
        inputs = inputs.to(self.device, non_blocking=True)
        targets = targets.to(self.device, non_blocking=True)
        batch_size = batch_size or len(targets)
        batches = self._mix_parts(inputs, targets, batch_size)
        statistics = self.non_finite.copy_statistics(self.network)
        while (sums := self._sum_gradients(batches, optimizer, batch_size)) is None:
            self.micro_batches.split_further(max(self.parts.sizes(batch_size)), self.step, self.device)
            optimizer.zero_grad(set_to_none=True)
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
        loss, hits = sums
        checks_norm = self.by_rows and (self.clip_grad or self.non_finite.skips)
        norm = norm_by_rows(self.network.parameters()) if checks_norm else None
        if self.non_finite.must_skip(loss, optimizer, self.scaler, norm):
            loss, hits = torch.full_like(loss, math.nan), torch.zeros_like(hits)
            for buffer, before in zip(self.network.buffers(), statistics, strict=True):
                buffer.copy_(before)
        else:
            if self.clip_grad and norm is not None:
                scale_gradients(self.network.parameters(), norm, self.clip_grad)
            elif self.clip_grad:
                self.scaler.unscale_(optimizer)
                torch.nn.utils.clip_grad_norm_(self.network.parameters(), self.clip_grad)
            self.scaler.step(optimizer)
            self.scaler.update()
            if self.ema:
                self.ema.update(self.step)
        optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return loss, hits

    def _mix_parts(self, inputs: Tensor, targets: Tensor, batch_size: int) -> list[Batch]:
        """The parts of this rank, each with its images mixed."""
        sizes = self.parts.sizes(batch_size)
        numbered = enumerate(zip(inputs.split(sizes), targets.split(sizes), strict=True), self.parts.first)
        return [self.loss.mix(*rows, self._seed("mix", part)) for part, rows in numbered]

    def _seed(self, purpose: str, part: int) -> int:
        """The seed of what is drawn for a part of this step."""
        return derive_seed(self.seed, purpose, self.step, *([part] if self.parts.count > 1 else []))

    def _sum_gradients(
        self, batches: Sequence[Batch], optimizer: Optimizer, batch_size: int
    ) -> tuple[Tensor, Tensor] | None:
        """Leave the gradients of the mean loss of the global batch in the weights; return the loss and the number of
        correct predictions. None: a rank is out of memory."""
        if self.parts.count == 1 or not self.exact:
            return self._sum_fast(batches, batch_size)
        sums = PartSums(self.network, None if self.sharded else optimizer, self.parts)
        for part, batch in enumerate(batches, self.parts.first):
            try:
                sums.add(part, *self._accumulate_gradients(batch, self._seed("step", part), batch_size))
            except (RuntimeError, MemoryError) as error:
                self.micro_batches.note(error)
                if self.sharded:
                    self._refuse_split(error)
                sums.add_failed(part)
        if self.sharded:
            self._keep_pace(batches)
            sums.restore_statistics()
        return sums.finish(runtime)

    def _keep_pace(self, batches: Sequence[Batch]) -> None:
        """With divided weights all ranks have to call the network equally often: repeat a part, without its gradients,
        if others have more parts."""
        for _ in range(self.parts.rounds - len(batches)):
            self._accumulate_gradients(batches[-1], seed=0, batch_size=math.inf)

    def _refuse_split(self, error: Exception) -> NoReturn:
        """Raise an OutOfMemory: the other ranks wait for these gradients, so the step can't be repeated."""
        raise OutOfMemory(
            f"rank {runtime.rank} is out of memory: set parts to {2 * self.parts.count}, or, without shard, reduce to "
            f"exact, which splits batches by itself ({error})"
        ) from error

    def _sum_fast(self, batches: Sequence[Batch], batch_size: int) -> tuple[Tensor, Tensor] | None:
        """`_sum_gradients` in the order in which gradients are computed; torch adds those of the ranks."""
        sums = []
        try:
            for part, batch in enumerate(batches, self.parts.first):
                last = part == self.parts.end - 1
                sums.append(self._accumulate_gradients(batch, self._seed("step", part), batch_size, last))
        except (RuntimeError, MemoryError) as error:
            self.micro_batches.note(error)
            if runtime.world_size > 1:
                self._refuse_split(error)
            return None
        if self.sharded:
            self._keep_pace(batches)
        loss, hits = (torch.stack(values).sum(dim=0) for values in zip(*sums, strict=True))
        return self._share_numbers(loss, hits) if runtime.world_size > 1 else (loss, hits)

    def _share_numbers(self, loss: Tensor, hits: Tensor) -> tuple[Tensor, Tensor]:
        """Sums over all ranks; their batch norm statistics become the means, and they agree on requests."""
        statistics = [tensor for tensor in running_statistics(self.network) if tensor.is_floating_point()]
        requests = loss.new_tensor([float(flag) for flag in own_requests()])
        shared = torch.cat([loss[None], hits[None].float(), requests, *(tensor.view(-1) for tensor in statistics)])
        runtime.add(shared)
        self._requests += shared[2:5]
        if self.device.type == "cpu" or self.step % CHECK_EVERY == 0:  # it waits for the device
            agree_on_requests(*(self._requests > 0).tolist())
            self._requests.zero_()
        means = (shared[5:] / runtime.world_size).split([tensor.numel() for tensor in statistics])
        for tensor, mean in zip(statistics, means, strict=False):
            tensor.copy_(mean.view(tensor.shape))
        return shared[0], shared[1].long()

    def _accumulate_gradients(
        self, batch: Batch, seed: int, batch_size: float, last: bool = True
    ) -> tuple[Tensor, Tensor]:
        """Add the gradients of all micro-batches of a part; return the sum of its losses, divided by `batch_size`, and
        the number of its correct predictions. With the `last` part, `DistributedDataParallel` adds those of the ranks.
        """
        torch.manual_seed(seed)
        total, hits = torch.zeros((), device=self.device), torch.zeros((), dtype=torch.int64, device=self.device)
        count = min(self.micro_batches.count, len(batch.class_ids))
        ranks = runtime.world_size if isinstance(self.network, DistributedDataParallel) else 1
        for number, micro_batch in enumerate(batch.split(count), start=1):
            with nullcontext() if ranks == 1 or (last and number == count) else self.network.no_sync():
                with autocast(self.device, self.precision):
                    logits = self.network(micro_batch.inputs)
                loss = self.loss(logits.float(), micro_batch).sum() / batch_size
                self.scaler.scale(loss * ranks if ranks > 1 else loss).backward()  # it takes the mean over the ranks
            total += loss.detach()
            hits += (logits.argmax(dim=1) == micro_batch.main_class_ids).sum()
        return total, hits

    def shard(self, model: FreezableNetwork) -> None:
        """Divide the weights of `model`, which is that of `network`, between the ranks."""
        shard_network(model, self.parts, self.exact, self.precision)
        if self.ema:
            self.ema.attach(model)
        self.sharded = True

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

    def validate(self, loader: DataLoader, is_start: bool = False) -> dict[str, float]:
        """Compute loss and accuracy over all images of `loader`, the loss after temperature scaling with its standard
        error, whether they are worse than at the start, see `is_worse`, and whether they are beaten by the lowest
        loss so far.

        Args:
            is_start: this is the validation before the first step, with which later ones are compared.

        Raises:
            NonFiniteLoss: the loss isn't finite.
        """
        with self.evaluated_weights():
            logits, targets = predict_logits(
                self.network, loader, self.device, self.precision, "validating", self.micro_batches.count, self.sharded
            )
        metrics, images = runtime.first(lambda: self._validation_metrics(logits, targets))
        if is_start:
            self.start = images
        if not metrics["val_worse"] and not (self.lowest and self.lowest["losses"].mean() <= images["losses"].mean()):
            self.lowest = images
        return metrics

    def _validation_metrics(self, logits: Tensor, targets: Tensor) -> tuple[dict[str, float], dict[str, Tensor]]:
        """The metrics of `validate`, of logits (N, classes) and class ids (N,), and those of each image."""
        loss = cross_entropy(logits, targets)
        # The plain loss is finite even if logits of wrong classes overflow to -inf.
        losses = calibrated_losses(logits, targets) if math.isfinite(loss) else torch.tensor([loss])
        calibrated = losses.mean().item()
        if not math.isfinite(calibrated):
            raise NonFiniteLoss(f"the validation loss is {calibrated} after step {self.step}; {REMEDY}")
        images = {"losses": losses, "correct": logits.argmax(dim=1) == targets}
        metrics = {
            "val_loss": loss,
            "val_top1": top_k_accuracy(logits, targets, 1),
            "val_calibrated_loss": calibrated,
            "val_calibrated_loss_error": losses.std(correction=0).item() / len(losses) ** 0.5,
            "val_worse": float(self._is_worse_than_start(images)),
            "val_beaten": float(self._is_beaten(images)),
        }
        return metrics, images

    def _is_worse_than_start(self, images: dict[str, Tensor]) -> bool:
        if not self.start:
            return False
        return is_worse(*(images[name].numpy() for name in images), *(self.start[name].numpy() for name in images))

    def _is_beaten(self, images: dict[str, Tensor]) -> bool:
        """Whether the losses are more than a standard error of the difference above the lowest so far."""
        return bool(self.lowest) and is_higher(images["losses"].numpy(), self.lowest["losses"].numpy(), ONE_ERROR)

    def state_dict(self) -> dict[str, Any]:
        """The state for a checkpoint, without the weights."""
        return {
            "step": self.step,
            "scaler": self.scaler.state_dict(),
            "micro_batches": self.micro_batches.count,
            "start": self.start,
            "lowest": self.lowest,
            **self.epoch.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a state."""
        self.step, self.micro_batches.count = state["step"], state["micro_batches"]
        self.start, self.lowest = state["start"], state["lowest"]
        if state["scaler"]:  # empty if the scaler wasn't enabled
            self.scaler.load_state_dict(state["scaler"])
        self.epoch.load_state_dict(state)


def build_trainer(
    config: TrainConfig,
    data: Data,
    device: torch.device,
    precision: str,
    resumed: dict[str, Any] | None = None,
    teacher: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Trainer, BuiltNetwork]:
    """Build network, loss, EMA and trainer from `config`, in the state of the checkpoint `resumed` if there is one. For
    the `teacher` see `TrainingLoss`."""
    built = build_network(config, data.class_names, resumed)
    config, model = built.config, built.model
    if device.type == "cuda" and runtime.world_size > 1 and not adds_exactly(config, device):
        nn.SyncBatchNorm.convert_sync_batchnorm(model)  # a rank's share of a batch can be small
    network = PixelNetwork(model, Preprocessing.from_config(config), device)
    class_ids = data.train_images.class_ids
    weights = balanced_class_weights(class_ids, len(data.class_names)) if config.class_weights == "balanced" else None
    if weights is not None and (weights[weights > 0] == 1).all():
        print("class_weights=balanced: changes nothing, since all classes have equally many training images")
    loss = TrainingLoss(weights, config.label_smoothing, config.mixup, config.cutmix, teacher)
    ema = WeightEMA(model, config.ema_decay) if config.ema_decay else None
    if ema and resumed:
        ema.load(resumed["weights"])
    parts = Parts.of_rank(config.parts, runtime.rank, runtime.world_size)
    exact = adds_exactly(config, device)
    by_rows = config.shard == "yes" or must_shard(config, sum(p.numel() for p in model.parameters()), device)
    policies = (config.on_nan, config.clip_grad, parts, exact, by_rows)
    trainer = Trainer(network, device, precision, config.seed, loss, ema, *policies)
    if resumed:
        trainer.load_state_dict(resumed)
    return trainer, built
