"""The parts of a global batch: which rank computes which, and sums that don't depend on the number of ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer

from utils.config.train_config import TrainConfig
from utils.system.runtime import Runtime
from utils.system.signals import agree_on_requests, own_requests

NUMBERS = 6
"""Numbers in a step's vector besides gradients and statistics: loss, correct predictions, failed parts, requests to
stop, to save, and to save since it is time."""


@dataclass(frozen=True)
class Parts:
    """The parts of each global batch, and those of one rank.

    Attributes:
        count: parts of a global batch.
        first: first part of this rank, from 0.
        end: the part after its last.
        rounds: parts of the rank that has most.
    """

    count: int = 1
    first: int = 0
    end: int = 1
    rounds: int = 1

    @staticmethod
    def of_rank(count: int, rank: int, world_size: int) -> Parts:
        """The share of a rank: consecutive parts, as many as of other ranks or one more or less.

        Raises:
            ValueError: there are fewer parts than ranks.
        """
        if count < world_size:
            raise ValueError(
                f"parts={count}: {world_size} processes need at least as many parts; set parts={world_size}, or more "
                f"if the run may get more processes later"
            )
        return Parts(count, rank * count // world_size, (rank + 1) * count // world_size, -(-count // world_size))

    def rows(self, batch_size: int) -> slice:
        """The rows of this rank in a global batch."""
        return slice(self._start(self.first, batch_size), self._start(self.end, batch_size))

    def sizes(self, batch_size: int) -> list[int]:
        """The number of rows of each part of this rank."""
        starts = [self._start(part, batch_size) for part in range(self.first, self.end + 1)]
        return [end - start for start, end in pairwise(starts)]

    def _start(self, part: int, batch_size: int) -> int:
        return part * batch_size // self.count


def adds_exactly(config: TrainConfig, device: torch.device) -> bool:
    """Whether gradients are added in an order that doesn't depend on the number of ranks, see `TrainConfig.reduce`."""
    return config.reduce == "exact" or (config.reduce == "auto" and device.type == "cpu")


@dataclass
class TreeSum:
    """Adds vectors, one for each part, as a fixed binary tree does: ((0 + 1) + (2 + 3)) + ((4 + 5) + 6), so that the
    result has the same bits whoever adds which.

    A node covers 2 ** level parts, from index * 2 ** level on; at the right edge the missing ones are ignored.

    Attributes:
        count: parts in all.
        nodes: sums so far, as (level, index, value), from left to right.
    """

    count: int
    add_to: Callable[[Any, Any], Any] = Tensor.add_
    nodes: list[tuple[int, int, Any]] = field(default_factory=list)

    def add(self, value: Any, index: int, level: int = 0) -> None:
        """Add a node, after those to its left. `value` may be overwritten."""
        while 1 << level < self.count:
            if index % 2:
                if not self.nodes or self.nodes[-1][:2] != (level, index - 1):
                    break
                value = self.add_to(self.nodes.pop()[2], value)
            elif (index + 1) << level < self.count:  # it has a neighbor to the right
                break
            level, index = level + 1, index // 2
        self.nodes.append((level, index, value))


def nodes_of(parts: Parts) -> list[tuple[int, int]]:
    """Level and index of the sums that a rank has after adding its own parts."""
    tree = TreeSum(parts.count, lambda left, _: left)
    for part in range(parts.first, parts.end):
        tree.add(None, part)
    return [(level, index) for level, index, _ in tree.nodes]


def sum_over_ranks(tree: TreeSum, runtime: Runtime) -> Tensor:
    """The sum of the vectors of all ranks, whose `tree` has those of their own parts."""
    return runtime.join_slices(sum_own_slice(tree, runtime))[: len(tree.nodes[0][2])]


def sum_own_slice(tree: TreeSum, runtime: Runtime) -> Tensor:
    """This rank's slice of the sum: each rank completes the tree for one slice of the vectors, padded with zeros."""
    ranks = [nodes_of(Parts.of_rank(tree.count, rank, runtime.world_size)) for rank in range(runtime.world_size)]
    own = torch.stack([value for *_, value in tree.nodes])  # (nodes, length)
    length = own.shape[1]
    width = -(-length // runtime.world_size)
    own = torch.nn.functional.pad(own, (0, width * runtime.world_size - length))
    received = runtime.exchange(own.split(width, dim=1), [(len(nodes), width) for nodes in ranks])
    total = TreeSum(tree.count)
    for nodes, sums in zip(ranks, received, strict=True):
        for (level, index), value in zip(nodes, sums, strict=True):
            total.add(value, index, level)
    ((*_, slice_sum),) = total.nodes
    return slice_sum


class PartSums:
    """Gradients, batch norm statistics and losses of the parts of one step, and their sum over all parts of all ranks.

    Each part starts with the statistics of before the step; afterwards they are the mean of the parts'.

    Args:
        network: the network.
        optimizer: of the weights whose gradients are summed; None: FSDP sums them.
        parts: of this rank.
    """

    def __init__(self, network: nn.Module, optimizer: Optimizer | None, parts: Parts) -> None:
        self.parts = parts
        self._optimizer = optimizer
        groups = optimizer.param_groups if optimizer else []
        self._weights = [weight for group in groups for weight in group["params"]]
        self._used = [False] * len(self._weights)
        self._statistics = running_statistics(network)
        self._before = [tensor.clone() for tensor in self._statistics]
        self._tree = TreeSum(parts.count, _add_lists)

    def add(self, part: int, loss: Tensor, hits: Tensor) -> None:
        """Add a part after its backward pass, with its share of the mean loss and its correct predictions."""
        self._used = [weight.grad is not None for weight in self._weights]
        self._add(part, [loss, hits, torch.zeros_like(loss)])

    def add_failed(self, part: int) -> None:
        """Add a part for which there wasn't enough memory."""
        zero = self._weights[0].new_zeros(())
        self._add(part, [zero, zero, zero + 1])

    def _add(self, part: int, numbers: list[Tensor]) -> None:
        gradients = [torch.zeros_like(w) if w.grad is None else w.grad for w in self._weights]
        numbers += [numbers[0].new_tensor(float(flag)) for flag in own_requests()]
        values = [*gradients, *(tensor.clone() for tensor in self._floating()), torch.stack(numbers)]
        self._tree.add([value.detach().float() for value in values], part)
        if self._optimizer:
            self._optimizer.zero_grad(set_to_none=True)
        self.restore_statistics()

    def restore_statistics(self) -> None:
        """Set batch norm's statistics to those before the step."""
        for tensor, before in zip(self._statistics, self._before, strict=True):
            tensor.copy_(before)

    def _floating(self) -> list[Tensor]:
        return [tensor for tensor in self._statistics if tensor.is_floating_point()]

    def finish(self, runtime: Runtime) -> tuple[Tensor, Tensor] | None:
        """Set gradients and statistics to those of the global batch, and return its mean loss and number of correct
        predictions; None: a rank was out of memory."""
        *values, numbers = self._total(runtime)
        loss, hits, failed = numbers[:3]
        if runtime.world_size > 1:
            agree_on_requests(*(numbers[3:] > 0).tolist())
        if failed > 0:
            return None
        for weight, used, value in zip(self._weights, self._used, values, strict=False):
            weight.grad = _like(value.to(weight.dtype), weight) if used else None
        for tensor, value in zip(self._floating(), values[len(self._weights) :], strict=True):
            tensor.copy_(value.view(tensor.shape) / self.parts.count)
        for tensor in self._statistics:
            if not tensor.is_floating_point():
                tensor += 1
        return loss, hits.long()

    def _total(self, runtime: Runtime) -> Sequence[Tensor]:
        """The sums over all parts of all ranks: of gradients, statistics and numbers."""
        if runtime.world_size == 1:
            ((*_, total),) = self._tree.nodes
            return total
        nodes = [
            (level, index, torch.cat([tensor.reshape(-1) for tensor in value]))
            for level, index, value in self._tree.nodes
        ]
        sizes = [tensor.numel() for tensor in (*self._weights, *self._floating())]
        return sum_over_ranks(TreeSum(self.parts.count, nodes=nodes), runtime).split([*sizes, NUMBERS])


def _add_lists(left: list[Tensor], right: list[Tensor]) -> list[Tensor]:
    torch._foreach_add_(left, right)
    return left


def _like(value: Tensor, weight: Tensor) -> Tensor:
    """`value` in the shape of a weight, and in its memory format, on which the order of sums depends."""
    value = value.view(weight.shape)
    return value if value.stride() == weight.stride() else torch.empty_like(weight).copy_(value)


def running_statistics(network: nn.Module) -> list[Tensor]:
    """The buffers of all batch norms that this step updates: means, variances, numbers of batches."""
    norms = [module for module in network.modules() if isinstance(module, _BatchNorm) and module.training]
    return [buffer for norm in norms for buffer in norm.buffers()]
