"""Learning-rate range test: the loss at rising learning rates, and a suggested `init_lr`."""

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
from utils.system.files import make_folder, write_whole
from utils.system.runtime import runtime
from utils.training.datasets import Data, StageInputs, make_datasets
from utils.training.linear_probe import init_head
from utils.training.optimizer import batch_scale, build_optimizer, rate_limits, set_learning_rate
from utils.training.parts import Parts
from utils.training.stages import Stage
from utils.training.trainer import Trainer, build_trainer

LOWEST, HIGHEST = 1e-7, 1.0
DECADE = 20
"""Steps in which the rate rises tenfold. With fewer, noise can look like a falling loss."""
STEPS = 7 * DECADE
SMOOTHING = DECADE / 4
"""Standard deviation, in steps, of the Gaussian that smooths the losses for the suggestion. A running mean lags behind,
which doubles the suggestion."""
MOMENTUM = 0.9
"""Of the running mean of the losses, which decides when to stop."""
DIVERGED = 4.0
"""The test stops when the running mean is above its first value and this many times its lowest."""
MIN_FALL = 0.2
"""Share of its first value by which the loss has to fall. A fitted head leaves less, so that the test only measures how
soon larger steps undo the fit: it suggested a twenty-fifth of the rate with the best validation accuracy."""


@dataclass(frozen=True)
class RangeTest:
    """Result of a range test.

    Attributes:
        rates: learning rate of each step, rising.
        losses: smoothed training loss of each step.
        suggestion: the rate at which the loss falls fastest; None if it hardly falls.
    """

    rates: list[float]
    losses: list[float]
    suggestion: float | None


def suggest_learning_rate(config: TrainConfig, data: Data, stage: Stage, device: torch.device, precision: str) -> None:
    """Print the `init_lr` at which the loss falls fastest in `stage`, and plot the loss over the learning rate.

    Raises:
        ValueError: the loss hardly falls at any learning rate.
    """
    path = Path(config.save_dir, "learning_rates.png")
    make_folder(path.parent)  # before the work
    trainer, built = build_trainer(config, data, device, precision)
    config, model, trainer.ema = built.config, built.model, None
    inputs = StageInputs(config, data, trainer.network, device, precision)
    if config.head_init == "probe":
        init_head(model, inputs.cache, inputs.train_set, inputs.val_set, inputs.config)
    model.resize(stage.input_shape)
    stage.frozen.apply(model)
    train_set, _ = make_datasets(data, config)
    loader = train_loader(train_set, stage.batch_size, config.num_workers, config.sampler)
    trainer.parts = Parts()
    result = runtime.first(lambda: run_range_test(trainer, loader, build_optimizer(model, config, stage.init_lr)))
    if not runtime.is_main:
        return
    if result.suggestion is None:
        with write_whole(path) as file:
            plot_range_test(result.rates, result.losses).savefig(file, format="png")
        raise ValueError(
            f"find_lr: the loss falls by less than a fifth at any learning rate, see {path}; if the head was fitted "
            f"before (head_init=probe, or weights of a run) keep init_lr={config.init_lr:g}, else check the labels, or "
            f"start from other weights"
        )
    lowest, highest = rate_limits(config.optimizer_type, model.transformer)
    suggestion = min(max(result.suggestion, lowest), highest)
    with write_whole(path) as file:
        plot_range_test(result.rates, result.losses, suggestion).savefig(file, format="png")
    init_lr = suggestion / batch_scale(stage.batch_size, model.transformer)
    limits = f" ({config.optimizer_type} is limited to {lowest:.0e} to {highest:.0e})"
    print(
        f"the loss falls fastest at a learning rate of {result.suggestion:.1e} with {stage.batch_size} images per step"
        f"{limits if suggestion != result.suggestion else ''}: init_lr={init_lr:.1e}, where {config.init_lr:g} is set; "
        f"see {path}. The recipe's value was chosen by validation accuracy: change it only for other networks, weights "
        f"or optimizers"
    )


def run_range_test(trainer: Trainer, loader: DataLoader, optimizer: Optimizer) -> RangeTest:
    """Take up to `STEPS` steps at learning rates that rise by a constant factor (Smith, "Cyclical Learning Rates for
    Training Neural Networks", 2017, section 3.3). The network can't be used afterwards."""
    trainer.network.train()
    rates: list[float] = []
    losses: list[float] = []
    means: list[float] = []
    running = 0.0
    batches = endless(loader)
    schedule = np.geomspace(LOWEST, HIGHEST, STEPS)
    for step, rate in enumerate(tqdm(schedule, "learning rates", leave=False, disable=None)):
        set_learning_rate(optimizer, rate)
        loss, _ = trainer.train_step(*next(batches), optimizer)
        running = MOMENTUM * running + (1 - MOMENTUM) * loss.item()
        mean = running / (1 - MOMENTUM ** (step + 1))  # corrects for the initial zero, as in Adam
        if not math.isfinite(mean) or (means and mean > max(DIVERGED * min(means), means[0])):
            break
        rates.append(float(rate))
        losses.append(loss.item())
        means.append(mean)
    smoothed = smooth(losses)
    return RangeTest(rates, smoothed, suggest(rates, smoothed))


def smooth(losses: list[float]) -> list[float]:
    """Smooth losses with a Gaussian."""
    return gaussian_filter1d(losses, SMOOTHING, mode="nearest").tolist() if losses else []


def endless(loader: DataLoader) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield batches, epoch after epoch."""
    epoch = 0
    while True:
        loader.batch_sampler.epoch = epoch
        yield from iterate_batches(loader)
        epoch += 1


def suggest(rates: list[float], losses: list[float]) -> float | None:
    """The middle of the decade of rates over which the loss falls most, up to its minimum; None if it falls too little,
    see `MIN_FALL`."""
    falling = np.array(losses[: int(np.argmin(losses)) + 1] if losses else [])
    falls = falling[:-DECADE] - falling[DECADE:]
    if not len(falls) or falls.max() <= 0 or falling[-1] > (1 - MIN_FALL) * falling[0]:
        return None
    return rates[int(np.argmax(falls)) + DECADE // 2]


def plot_range_test(rates: Sequence[float], losses: Sequence[float], suggestion: float | None = None) -> Figure:
    """Plot the loss of each step over its learning rate, and the suggested rate."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(rates, losses)
    axes.set(xscale="log", xlabel="learning rate", ylabel="training loss, smoothed")
    axes.grid(alpha=0.3)
    if suggestion is not None:
        axes.axvline(suggestion, color="tab:red", linestyle="--", label=f"falls fastest: {suggestion:.1e}")
        axes.legend()
        lowest, first = min(losses), losses[0]
        axes.set_ylim(lowest - 0.1 * (first - lowest), first + 0.5 * (first - lowest))
    return figure
