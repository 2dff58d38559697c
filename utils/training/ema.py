"""Exponential moving average (EMA) of a network's weights."""

from __future__ import annotations

from collections.abc import Container, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from nets.network import FreezableNetwork
from utils.system.signals import defer_signals


class WeightEMA:
    """EMA of a network's parameters (Polyak and Juditsky, 1992) and of its batch norms' statistics, updated every step.

    Args:
        model: the network with its initial weights.
        decay: share of the average that each step keeps, 0 to below 1. In the first steps it is lower, (1 + step) /
            (10 + step), so that the initial weights lose their influence quickly.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        saved = model.state_dict().keys()
        # A tensor that the network uses in several places has only its first name here.
        named = dict(model.named_parameters()) | dict(model.named_buffers())
        self.weights = {name: t for name, t in named.items() if name in saved and t.is_floating_point()}
        self.averages = {name: tensor.detach().clone() for name, tensor in self.weights.items()}
        self.thawed = list(self.weights)
        self.swapped = False

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Average the weights after step number `step`, from 0."""
        decay = min(self.decay, (1 + step) / (10 + step))
        averages, weights = ([tensors[name] for name in self.thawed] for tensors in (self.averages, self.weights))
        get_ema_multi_avg_fn(decay)(averages, weights, None)

    @torch.no_grad()
    def set_frozen(self, frozen: Container[str]) -> None:
        """Declare the weights that are frozen from now on, by name. They take their EMA values, so that trainable
        layers see the features used at evaluation."""
        for name in self.averages:
            if name in frozen:
                self.weights[name].copy_(self.averages[name])
        self.thawed = [name for name in self.averages if name not in frozen]

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Within this context the network has the EMA values as its weights."""
        try:
            self._swap(True)
            yield
        finally:
            self._swap(False)

    def _swap(self, swapped: bool) -> None:
        with defer_signals():  # a signal in between would leave half of the weights swapped
            if self.swapped != swapped:
                for name, tensor in self.weights.items():
                    tensor.data, self.averages[name] = self.averages[name], tensor.data
                self.swapped = swapped

    def resize(self, model: FreezableNetwork, input_shape: Sequence[int]) -> None:
        """Resample the averages as `model.resize(input_shape)` resamples the weights. Call it before."""
        self.averages = model.resize_state(self.averages, input_shape)

    def load(self, weights: dict[str, Tensor]) -> None:
        """Set the averages to those in a state dict."""
        for name, average in self.averages.items():
            average.copy_(weights[name])
