"""Weights, gradients and optimizer state divided between the ranks (FSDP2), for networks too large for one device."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from nets.network import FreezableNetwork
from utils.config.train_config import TrainConfig
from utils.modeling.precision import DTYPES
from utils.system.runtime import is_shard, runtime
from utils.training.parts import Parts, TreeSum, sum_own_slice

MAX_MEMORY = 0.6
"""Share of a GPU's memory that weights, gradients and optimizer state may take without being divided; activations need
the rest."""
BYTES_PER_PARAMETER = {"sgd": 12, "adam": 16, "adamw": 16, "muon": 16}
"""Weight, gradient and optimizer state, in fp32."""


def must_shard(config: TrainConfig, parameters: int, device: torch.device) -> bool:
    """Whether to divide the weights between the ranks, see `TrainConfig.shard`."""
    if runtime.world_size == 1 or config.shard == "no":
        return False
    if config.shard == "yes":
        return True
    if device.type != "cuda":
        return False
    ema = 4 if config.ema_decay else 0
    needed = parameters * (BYTES_PER_PARAMETER[config.optimizer_type] + ema)
    return needed > MAX_MEMORY * torch.cuda.get_device_properties(device).total_memory


def check_sharding(config: TrainConfig, precision: str) -> None:
    """Raise a ValueError if the weights can't be divided with these settings."""
    if config.optimizer_type == "muon":
        raise ValueError(
            "optimizer_type='muon': orthogonalizes whole matrices, which no rank has with shard; set adamw, or shard=no"
        )
    if precision == "fp16":
        raise ValueError("precision='fp16': its loss scaler can't be used with shard; set bf16 or fp32, or shard=no")


class TreeScatter:
    """What FSDP does with the gradients of a group of weights after each backward pass: here, after the last one of a
    step, the sum of all parts of all ranks, see `TreeSum`; zero after the others. Passes after the last part of this
    rank only keep pace with other ranks.

    Interface: `torch.distributed.fsdp.ReduceScatter`.
    """

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._start()

    def _start(self) -> None:
        self._tree, self._part = TreeSum(self._parts.count), self._parts.first

    def allocate(self, size: tuple[int, ...], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """A tensor for gradients."""
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(self, output_tensor: Tensor, input_tensor: Tensor, **_: object) -> None:
        """Take the gradients of a part, (world_size * n,); set `output_tensor` (n,) to the sum of this rank's shard."""
        if self._part < self._parts.end:
            self._tree.add(input_tensor.clone(), self._part)
        self._part += 1
        if self._part < self._parts.first + self._parts.rounds:
            output_tensor.zero_()
        else:
            output_tensor.copy_(sum_own_slice(self._tree, runtime))
            self._start()


def shard_network(model: FreezableNetwork, parts: Parts, exact: bool, precision: str) -> None:
    """Divide the weights of `model` between the ranks: those of each block, and the rest. From now on it is called as a
    whole, by all ranks equally often."""
    modules = [part.forward for part in model.parts() if isinstance(part.forward, nn.Module)]
    blocks = [module for module in modules if any(True for _ in module.parameters())]
    scatters = (lambda: TreeScatter(parts)) if exact else None
    runtime.shard([*blocks, model], scatters, None if exact or precision == "fp32" else DTYPES[precision])


def gather_shards(content: Any) -> Any:
    """`content`, nested dicts and lists, with whole tensors on the CPU instead of shards; all ranks call it."""
    if isinstance(content, dict):
        return {name: gather_shards(value) for name, value in content.items()}
    if isinstance(content, list):
        return [gather_shards(value) for value in content]
    return content.full_tensor().cpu() if isinstance(content, Tensor) and is_shard(content) else content


def copy_shards(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors, but copies of those that are divided: swapping in the EMA changes their content."""
    return {name: tensor.clone() if is_shard(tensor) else tensor for name, tensor in tensors.items()}


def norm_by_rows(weights: Iterable[nn.Parameter]) -> Tensor:
    """The norm of all gradients. Sums of squares are taken by rows, then over all rows in order, so that the result
    doesn't depend on which rank has which rows."""
    gradients = [weight.grad for weight in weights if weight.grad is not None]
    counts = [gradient.shape[0] if gradient.ndim else 1 for gradient in gradients]
    squares = torch.zeros(sum(counts), device=gradients[0].device)
    for start, gradient in zip(torch.tensor([0, *counts]).cumsum(0).tolist(), gradients, strict=False):
        local, first = runtime.own_rows(gradient)
        rows = local.reshape(len(local), math.prod(local.shape[1:])) if local.ndim else local.reshape(1, 1)
        squares[start + first : start + first + len(rows)] = rows.float().square().sum(dim=1)
    if any(map(is_shard, gradients)):
        runtime.add(squares)  # each row is from one rank, and the others add zero
    return squares.sum().sqrt()


@torch.no_grad()
def scale_gradients(weights: Iterable[nn.Parameter], norm: Tensor, max_norm: float) -> None:
    """Scale all gradients down to `max_norm`, as `torch.nn.utils.clip_grad_norm_` does."""
    factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    for weight in weights:
        if weight.grad is not None:
            local, _ = runtime.own_rows(weight.grad)
            local.mul_(factor)
