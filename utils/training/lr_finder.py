"""The learning-rate range test: how fast the loss falls at every rate, and where it begins to rise."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from scipy.ndimage import gaussian_filter1d
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.data import DataLoader
from tqdm import tqdm

from utils.config.train_config import TrainConfig
from utils.data.loader import iterate_batches, train_loader
from utils.training.datasets import Data, StageInputs, make_datasets
from utils.training.linear_probe import init_head
from utils.training.optimizer import batch_scale, build_optimizer, rate_limits, set_learning_rate
from utils.training.stages import Stage
from utils.training.trainer import Trainer, build_trainer

LOWEST, HIGHEST = 1e-7, 1.0
DECADE = 20
"""Steps to a rate ten times as high; over fewer, noise would pass for a fall."""
STEPS = 7 * DECADE
SMOOTHING = DECADE / 4
"""Deviation, in steps, of the Gaussian that smooths the losses in the end. A running mean would lag behind them, and by
that the suggestion would be twice too high."""
KEPT = 0.9
"""Part of the running mean of the losses that each step keeps, which tells when to stop."""
DIVERGED = 4.0
"""Times the lowest running mean, and above the first, at which the test ends: nothing is to be learned beyond."""


@dataclass(frozen=True)
class RangeTest:
    """What a range test found.

    Attributes:
        rates: learning rate of each step, rising.
        losses: training loss of each step, smoothed.
        suggestion: the rate at which it falls fastest; None if it fell at none.
    """

    rates: list[float]
    losses: list[float]
    suggestion: float | None


def suggest_learning_rate(config: TrainConfig, data: Data, stage: Stage, device: torch.device, precision: str) -> None:
    """Print the `init_lr` at which the loss falls fastest in `stage`, and plot the loss over the learning rate.

    Raises:
        ValueError: the loss fell at no learning rate.
    """
    trainer, built = build_trainer(config, data, device, precision)
    config, model, trainer.ema = built.config, built.model, None
    inputs = StageInputs(config, data, trainer.network, device, precision)
    if config.head_init == "probe":
        init_head(model, inputs.cache, inputs.train_set, inputs.val_set, inputs.config)
    model.resize(stage.input_shape)
    stage.frozen.apply(model)
    train_set, _ = make_datasets(data, config)
    loader = train_loader(train_set, stage.batch_size, config.num_workers, config.sampler)
    found = run_range_test(trainer, loader, build_optimizer(model, config, stage.init_lr))
    path = Path(config.save_dir, "learning_rates.png")
    path.parent.mkdir(parents=True, exist_ok=True)
    if found.suggestion is None:
        plot_range_test(found.rates, found.losses).savefig(path)
        raise ValueError(
            f"the loss fell at no learning rate, see {path}: check the labels, or start from other weights. If the "
            f"loss is small from the start there is little left to learn: keep init_lr as it is"
        )
    lowest, highest = rate_limits(config.optimizer_type, model.transformer)
    suggestion = min(max(found.suggestion, lowest), highest)
    plot_range_test(found.rates, found.losses, suggestion).savefig(path)
    init_lr = suggestion / batch_scale(stage.batch_size, model.transformer)
    limits = f" ({config.optimizer_type} is limited to {lowest:.0e} to {highest:.0e})"
    print(
        f"the loss falls fastest at a learning rate of {found.suggestion:.1e} with {stage.batch_size} images per step"
        f"{limits if suggestion != found.suggestion else ''}: init_lr={init_lr:.1e}; see {path}"
    )


def run_range_test(trainer: Trainer, loader: DataLoader, optimizer: Optimizer) -> RangeTest:
    """Take up to `STEPS` steps at learning rates that rise by a constant factor.

    Smith, "Cyclical Learning Rates for Training Neural Networks", 2017, section 3.3. The network can't be used
    afterwards.
    """
    trainer.network.train()
    rates: list[float] = []
    losses: list[float] = []
    means: list[float] = []
    kept = 0.0
    batches = endless(loader)
    for step, rate in enumerate(
        tqdm(np.geomspace(LOWEST, HIGHEST, STEPS), "learning rates", leave=False, disable=None)
    ):
        set_learning_rate(optimizer, rate)
        loss, _ = trainer.train_step(*next(batches), optimizer)
        kept = KEPT * kept + (1 - KEPT) * loss.item()
        mean = kept / (1 - KEPT ** (step + 1))  # without the zero that it began with
        if not math.isfinite(mean) or (means and mean > max(DIVERGED * min(means), means[0])):
            break
        rates.append(float(rate))
        losses.append(loss.item())
        means.append(mean)
    smoothed = smooth(losses)
    return RangeTest(rates, smoothed, suggest(rates, smoothed))


def smooth(losses: list[float]) -> list[float]:
    """Losses averaged with those before and after."""
    return gaussian_filter1d(losses, SMOOTHING, mode="nearest").tolist() if losses else []


def endless(loader: DataLoader) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches, epoch after epoch."""
    epoch = 0
    while True:
        loader.sampler.epoch, loader.sampler.start = epoch, 0
        yield from iterate_batches(loader)
        epoch += 1


def suggest(rates: list[float], losses: list[float]) -> float | None:
    """The rate in the middle of the decade over which the loss falls most, before it is at its lowest; None if it
    didn't fall."""
    falling = np.array(losses[: int(np.argmin(losses)) + 1] if losses else [])
    falls = falling[:-DECADE] - falling[DECADE:]
    if not len(falls) or falls.max() <= 0:
        return None
    return rates[int(np.argmax(falls)) + DECADE // 2]


def plot_range_test(rates: Sequence[float], losses: Sequence[float], suggestion: float | None = None) -> Figure:
    """The loss over the learning rate of a step, and the rate that is suggested, if one is."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(rates, losses)
    axes.set(xscale="log", xlabel="learning rate of the step", ylabel="training loss, smoothed")
    axes.grid(alpha=0.3)
    if suggestion is not None:
        axes.axvline(suggestion, color="tab:red", linestyle="--", label=f"falls fastest: {suggestion:.1e}")
        axes.legend()
        lowest, first = min(losses), losses[0]
        axes.set_ylim(lowest - 0.1 * (first - lowest), first + 0.5 * (first - lowest))
    return figure
