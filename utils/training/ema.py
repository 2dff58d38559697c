"""Exponential moving average (EMA) of a network's weights."""

from __future__ import annotations

from collections.abc import Container, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from nets.network import FreezableNetwork
from utils.system.runtime import is_shard, runtime
from utils.system.signals import defer_signals


class WeightEMA:
    """EMA of the parameters (Polyak and Juditsky, 1992) and batch norm statistics of a network, updated every step.

    Args:
        model: the network with its initial weights.
        decay: 0 to below 1; at first at most (1 + step) / (10 + step), to forget the initial weights quickly.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        saved = model.state_dict().keys()
        # A tensor that is used in several places is listed once, by its first name.
        named = dict(model.named_parameters()) | dict(model.named_buffers())
        self.weights = {name: t for name, t in named.items() if name in saved and t.is_floating_point()}
        self.averages = {name: tensor.detach().clone() for name, tensor in self.weights.items()}
        self.thawed = list(self.weights)
        self.swapped = False

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Update the averages after `step`, counted from 0."""
        decay = min(self.decay, (1 + step) / (10 + step))
        averages, weights = ([tensors[name] for name in self.thawed] for tensors in (self.averages, self.weights))
        get_ema_multi_avg_fn(decay)(averages, weights, None)

    @torch.no_grad()
    def set_frozen(self, frozen: Container[str]) -> None:
        """Set which weights are frozen, by name. They take their EMA values: trainable layers then see the features
        that are used at evaluation."""
        for name in self.averages:
            if name in frozen:
                self.weights[name].copy_(self.averages[name])
        self.thawed = [name for name in self.averages if name not in frozen]

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Use the EMA values as the weights of the network within this context."""
        try:
            self._swap(True)
            yield
        finally:
            self._swap(False)

    def _swap(self, swapped: bool) -> None:
        with defer_signals():  # a signal could leave only some weights swapped
            if self.swapped != swapped:
                for name, tensor in self.weights.items():
                    if is_shard(tensor):  # FSDP keeps its memory
                        _swap_content(tensor, self.averages[name])
                    else:
                        tensor.data, self.averages[name] = self.averages[name], tensor.data
                self.swapped = swapped

    def attach(self, model: nn.Module) -> None:
        """Average the weights of `model` from now on: the same ones, but divided between ranks."""
        named = dict(model.named_parameters()) | dict(model.named_buffers())
        self.weights = {name: named[name] for name in self.weights}
        self.averages = {name: runtime.shard_like(t, self.weights[name]) for name, t in self.averages.items()}

    def resize(self, model: FreezableNetwork, input_shape: Sequence[int]) -> None:
        """Resample the averages as `model.resize(input_shape)` resamples the weights. Call it first."""
        self.averages = model.resize_state(self.averages, input_shape)

    def load(self, weights: dict[str, Tensor]) -> None:
        """Set the averages to those in a state dict."""
        for name, average in self.averages.items():
            average.copy_(weights[name])


@torch.no_grad()
def _swap_content(a: Tensor, b: Tensor) -> None:
    """Swap what two divided tensors hold on this rank."""
    a, b = a.to_local(), b.to_local()
    content = a.clone()
    a.copy_(b)
    b.copy_(content)
