"""Calibration by rules for the temperature, with few and many validation images, and of TTA.

    python benchmarks/calibration.py [--seeds 5]

For each network of trained_outputs.py, validation images are drawn `DRAWS` times; the rules see them, and log-loss and
expected calibration error (ECE) are of the test images. Figures are means over networks, intervals are Student's, 95 %,
over networks, of the difference to the rule `prior 1`. The last line is JSON.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import tyro
from measure import print_result
from scipy import stats
from torch import Tensor
from trained_outputs import Tensors, trained_outputs

from utils.metrics.scores import ECE_BINS, Scores, expected_calibration_error

COUNTS = (10, 30, 100, 300)
"""Validation images, or as many as there are."""
DRAWS = 20
GRID = np.linspace(-2, 2, 161)
"""Logarithms of temperatures."""
REFERENCE = "prior 1"

Figures = dict[str, list[tuple[float, float]]]
"""Log-loss and ECE for each network, by rule."""


def losses_on_grid(logits: Tensor, class_ids: Tensor) -> np.ndarray:
    """The cross-entropy (N, temperatures) of each image at each temperature of the grid."""
    scaled = [torch.nn.functional.cross_entropy(logits.double() / t, class_ids, reduction="none") for t in np.exp(GRID)]
    return torch.stack(scaled, dim=1).numpy()


def posterior(loss: np.ndarray, deviation: float) -> np.ndarray:
    """The posterior of the temperature on the grid, of the summed loss and a normal prior of its logarithm."""
    negative = loss + GRID**2 / (2 * deviation**2)
    density = np.exp(negative.min() - negative)
    return density / density.sum()


def curvature(loss: np.ndarray, at: int) -> float:
    """The second derivative of the summed loss by the logarithm of the temperature."""
    at = min(max(at, 1), len(GRID) - 2)
    return (loss[at - 1] - 2 * loss[at] + loss[at + 1]) / (GRID[1] - GRID[0]) ** 2


def mode(deviation: float, loss: np.ndarray) -> float:
    """The logarithm of the most probable temperature."""
    return GRID[posterior(loss, deviation).argmax()]


def mean(deviation: float, loss: np.ndarray) -> float:
    """The posterior mean of the logarithm of the temperature."""
    return float(posterior(loss, deviation) @ GRID)


def if_significant(loss: np.ndarray) -> float:
    """The most probable temperature if a likelihood-ratio test at 5 % rejects a temperature of 1, else 1."""
    found = mode(1.0, loss)
    ratio = 2 * (loss[len(GRID) // 2] - loss[np.abs(GRID - found).argmin()])
    return found if ratio > stats.chi2(1).ppf(0.95) else 0.0


def james_stein(loss: np.ndarray) -> float:
    """The most probable one, its logarithm multiplied by 1 - 1 / z^2, where z is its ratio to its standard error."""
    found = mode(1.0, loss)
    squared = found**2 * max(curvature(loss, int(np.abs(GRID - found).argmin())), 0)
    return found * max(0.0, 1 - 1 / squared) if squared else 0.0


RULES: dict[str, Callable[[np.ndarray], float]] = {
    "none": lambda loss: 0.0,
    REFERENCE: lambda loss: mode(1.0, loss),
    "prior 0.5": lambda loss: mode(0.5, loss),
    "prior 0.35": lambda loss: mode(0.35, loss),
    "prior 0.25": lambda loss: mode(0.25, loss),
    "prior 0.18": lambda loss: mode(0.18, loss),
    "prior 0.12": lambda loss: mode(0.12, loss),
    "posterior mean, prior 1": lambda loss: mean(1.0, loss),
    "posterior mean, prior 0.25": lambda loss: mean(0.25, loss),
    "likelihood ratio": if_significant,
    "James-Stein": james_stein,
}
"""The logarithm of the temperature, of the summed loss of the validation images at each temperature of the grid."""


def calibration_errors(logits: Tensor, class_ids: Tensor) -> np.ndarray:
    """The ECE (temperatures,) at each temperature of the grid, as `expected_calibration_error`."""
    correct, errors = (logits.argmax(1) == class_ids).numpy(), []
    for t in np.exp(GRID):
        confidence = (logits / t).softmax(1).amax(1).numpy()
        bins = np.clip(np.ceil(confidence * ECE_BINS).astype(int) - 1, 0, ECE_BINS - 1)
        errors.append(np.abs(np.bincount(bins, confidence - correct, ECE_BINS)).sum() / len(correct))
    return np.array(errors)


def compare_rules(tensors: Tensors, figures: dict[int, Figures], generator: np.random.Generator) -> None:
    """Add the figures of a network to those of each rule, by the number of validation images."""
    val = losses_on_grid(tensors["val_logits"], tensors["val_ids"])
    logits, ids = tensors["test_logits"].double(), tensors["test_ids"]
    on_grid = np.stack([losses_on_grid(logits, ids).mean(0), calibration_errors(logits, ids)], axis=1)
    for count, of_rules in figures.items():
        draws = DRAWS if count < len(val) else 1
        losses = [val[generator.permutation(len(val))[:count]].sum(0) for _ in range(draws)]
        for name, rule in RULES.items():
            chosen = [np.abs(GRID - rule(loss)).argmin() for loss in losses]
            of_rules.setdefault(name, []).append(tuple(on_grid[chosen].mean(0)))


class TTA(NamedTuple):
    """A way to average views: a function of view logits (N, views, classes) and the center's temperature, and one of
    the result and the fitted temperature."""

    average: Callable[[Tensor, float], Tensor]
    temper: Callable[[Tensor, float], Tensor]


def fit(losses: Sequence[float]) -> float:
    """The temperature of the grid with the lowest mean loss and a standard normal prior, of mean losses on the grid."""
    return float(np.exp(GRID[int(np.argmin(losses))]))


def mean_probabilities(views: Tensor, temperature: float) -> Tensor:
    """Logarithms (N, classes) of probabilities averaged over views."""
    return (views.double() / temperature).softmax(2).mean(1).log()


WAYS: dict[str, TTA] = {
    "probabilities": TTA(lambda views, t: mean_probabilities(views, t), lambda logits, t: logits),
    "probabilities, temperature of views": TTA(lambda views, _: views.double(), mean_probabilities),
    "probabilities, temperature of the average": TTA(mean_probabilities, lambda logits, t: logits / t),
    "logits": TTA(lambda views, t: views.double().mean(1) / t, lambda logits, t: logits),
    "logits, temperature of the average": TTA(lambda views, _: views.double().mean(1), lambda logits, t: logits / t),
}


def compare_tta(tensors: Tensors, figures: dict[str, list[tuple[float, float, float]]]) -> None:
    """Add log-loss, ECE and top-1 of a network for each way to average views."""
    val_ids, test_ids = tensors["val_ids"], tensors["test_ids"]
    penalties = GRID**2 / 2 / len(val_ids)
    center = fit(losses_on_grid(tensors["val_logits"], val_ids).mean(0) + penalties)

    def add(name: str, logits: Tensor) -> None:
        scores = Scores.from_logits(logits, test_ids)
        row = (float(scores.losses.mean()), expected_calibration_error(scores), float(scores.correct.mean()))
        figures.setdefault(name, []).append(row)

    add("center, temperature", tensors["test_logits"].double() / center)
    for name, (average, temper) in WAYS.items():
        val = average(tensors["val_views"], center)
        losses = [torch.nn.functional.cross_entropy(temper(val, t), val_ids).item() for t in np.exp(GRID)]
        add(name, temper(average(tensors["test_views"], center), fit(losses + penalties)))


def interval(differences: Sequence[float]) -> str:
    """The mean with its interval."""
    center, error = statistics.mean(differences), stats.sem(differences)
    half = stats.t.ppf(0.975, len(differences) - 1) * error
    return f"{center:+.4f} ({center - half:+.4f} to {center + half:+.4f})"


def print_table(title: str, figures: Figures, reference: str) -> None:
    """Print the mean figures of each rule and their differences to those of `reference`."""
    print(f"{title}: log-loss, ECE; minus those of {reference}")
    base = np.array(figures[reference])
    for name, values in figures.items():
        rows = np.array(values)
        means = " ".join(f"{value:.4f}" for value in rows.mean(0))
        print(f"  {name:<44}{means}  {interval(rows[:, 0] - base[:, 0])}  {interval(rows[:, 1] - base[:, 1])}")


def main(
    seeds: int = 5,
    tuned: int = 1,
    shared: Path = Path("../shared"),
    outputs: Path = Path("metrics_out/trained_outputs"),
) -> None:
    """Compare rules and ways.

    Args:
        seeds: networks of each kind for each data set.
        tuned: fine-tuned networks for each data set.
        shared: folder with `data` and `models`.
        outputs: folder of the networks' outputs; those that are there aren't computed again.
    """
    generator = np.random.default_rng(0)
    by_count: dict[int, Figures] = {count: {} for count in COUNTS}
    tta: Figures = {}
    names = []
    for name, kind, tensors in trained_outputs(seeds, tuned, shared, outputs):
        names.append((name, kind))
        compare_rules(tensors, by_count, generator)
        compare_tta(tensors, tta)
    for count, figures in by_count.items():
        print_table(f"{count} validation images", figures, REFERENCE)
    print_table("TTA (log-loss, ECE, top-1)", tta, "probabilities")
    for group in dict.fromkeys(chain.from_iterable(names)):
        rows = [i for i, name in enumerate(names) if group in name]
        for title, figures in {f"{COUNTS[1]} validation images": by_count[COUNTS[1]], "TTA": tta}.items():
            of_group = {rule: [values[i] for i in rows] for rule, values in figures.items()}
            print_table(f"{group}, {title}", of_group, next(iter({REFERENCE, "probabilities"} & figures.keys())))
    print_result("calibration", networks=names, rules=by_count, tta=tta)


if __name__ == "__main__":
    tyro.cli(main)
