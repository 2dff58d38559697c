"""The moving average of a network's weights."""

from __future__ import annotations

from collections.abc import Container, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from nets.network import FreezableNetwork
from utils.system.signals import defer_signals


class WeightEMA:
    """An exponential moving average of a network's parameters (Polyak and Juditsky, 1992), and of its batch norms'
    statistics, which go with them; one update a step.

    Args:
        model: the network, as it starts.
        decay: how much of the average is kept at each step, 0 to below 1. In the first steps it is less, (1 + step) /
            (10 + step), so that the start doesn't weigh on the average for long.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        saved = model.state_dict().keys()
        # What stands in several places of the network has its first name alone here.
        named = dict(model.named_parameters()) | dict(model.named_buffers())
        self.weights = {name: t for name, t in named.items() if name in saved and t.is_floating_point()}
        self.averages = {name: tensor.detach().clone() for name, tensor in self.weights.items()}
        self.moving = list(self.weights)
        self.swapped = False

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take up the weights after the update number `step`, from 0."""
        decay = min(self.decay, (1 + step) / (10 + step))
        averages, weights = ([tensors[name] for name in self.moving] for tensors in (self.averages, self.weights))
        get_ema_multi_avg_fn(decay)(averages, weights, None)

    @torch.no_grad()
    def set_frozen(self, frozen: Container[str]) -> None:
        """From now on the weights of these names don't change: they are set to their averages, so that the others learn
        beside what they are evaluated with."""
        for name in self.averages:
            if name in frozen:
                self.weights[name].copy_(self.averages[name])
        self.moving = [name for name in self.averages if name not in frozen]

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Within it, the network has the averages for its weights."""
        try:
            self._swap(True)
            yield
        finally:
            self._swap(False)

    def _swap(self, wanted: bool) -> None:
        with defer_signals():  # a signal would leave half of them
            if self.swapped != wanted:
                for name, tensor in self.weights.items():
                    tensor.data, self.averages[name] = self.averages[name], tensor.data
                self.swapped = wanted

    def resize(self, model: FreezableNetwork, input_shape: Sequence[int]) -> None:
        """Take the averages to where `model` will be after its own `resize`."""
        self.averages = model.resize_state(self.averages, input_shape)

    def load(self, weights: dict[str, Tensor]) -> None:
        """Set the averages to those in a state dict."""
        for name, average in self.averages.items():
            average.copy_(weights[name])
