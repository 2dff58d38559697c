"""Test accuracy on small sets: Thaw's `recipe="auto"` against timm, timm from a probed head, fastai, regression.

    python benchmarks/small_sets.py [--seeds 5 --methods recipe regression --results FILE]

Sets are cut from the training images of trashnet, sign_digits and cifar10: some classes, some images of each, which
depend on the seed. Every third training image serves for testing, as in best_epoch.py. All methods start from DINOv2's
ViT-S/14, have the same images and image size, and see about as many of them in training: five epochs, or 1,600 samples
if that is more. Methods take turns. Finished runs are kept in `--results` and not repeated. The last line is JSON.
"""

from __future__ import annotations

import math
import random
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import product
from pathlib import Path

import tyro
from accuracy import (
    Result,
    auto_config,
    dinov2_in,
    run_fastai,
    run_logistic,
    run_timm_mild,
    run_timm_probed,
    train_and_test,
)
from best_epoch import divide_all
from measure import Finished, print_result
from scipy import stats
from time_to_accuracy import in_temporary_folder

SIDES = {"trashnet": 112, "sign_digits": 70, "cifar10": 70}
EPOCHS, SAMPLES = 5, 1600
"""Epochs of the recipe on a CPU, and samples at least, over all epochs."""
CLASSES = (2, 10)
"""Classes of a cut; trashnet has 6."""
PER_CLASS = (5, 10, 20, 50)
"""Training images of each class."""


def cut(source: Path, folder: Path, classes: int, per_class: int, seed: int) -> Path:
    """Link some images of some classes in `source/train`, and all test images of these classes, to `folder`."""
    generator = random.Random(f"{source.name} {classes} {per_class} {seed}")
    names = sorted(path.name for path in (source / "train").iterdir())
    for name in generator.sample(names, min(classes, len(names))):
        images = sorted((source / "train" / name).iterdir())
        chosen = generator.sample(images, min(per_class, len(images)))
        for image in [*chosen, *(source / "test" / name).iterdir()]:
            link = folder / image.parent.parent.name / name / image.name
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(image.resolve())
    return folder


def run_recipe(data: Path, weights: Path, side: int, epochs: int, seed: int) -> Result:
    """`train.py` with the recipe, which decides how long to train."""
    return in_temporary_folder(train_and_test, auto_config(weights, side, EPOCHS, seed), data)


METHODS: dict[str, Callable[..., Result]] = {
    "recipe": run_recipe,
    "regression": run_logistic,
    "timm": run_timm_mild,
    "timm, probed": run_timm_probed,
    "fastai": run_fastai,
}


def interval(differences: Sequence[float]) -> tuple[float, float, float]:
    """Mean and Student's 95 % interval of paired differences."""
    mean = statistics.mean(differences)
    if len(differences) < 2:
        return mean, math.nan, math.nan
    margin = stats.t.ppf(0.975, len(differences) - 1) * statistics.stdev(differences) / len(differences) ** 0.5
    return mean, mean - margin, mean + margin


def print_table(top1: Mapping[str, Mapping[str, Sequence[float]]], methods: Sequence[str]) -> None:
    """Print a row for each cut, with the recipe's lead over each method in points, and one for the mean over cuts."""
    others = [method for method in methods if method != "recipe"]
    for title, scores in top1.items():
        means = ", ".join(f"{method} {statistics.mean(scores[method]):.1%}" for method in methods)
        leads = [interval([a - b for a, b in zip(scores["recipe"], scores[other], strict=True)]) for other in others]
        shown = ", ".join(
            f"{100 * mean:+.1f} ({100 * low:+.1f} to {100 * high:+.1f}) over {other}"
            for other, (mean, low, high) in zip(others, leads, strict=True)
        )
        print(f"{title}: {means}; lead {shown}")
    for method in methods:
        by_seed = [statistics.mean(scores) for scores in zip(*(cuts[method] for cuts in top1.values()), strict=True)]
        lead = [
            statistics.mean(a - b for a, b in zip(cuts["recipe"], cuts[method], strict=True)) for cuts in top1.values()
        ]
        mean, low, high = interval(lead)
        print(
            f"mean over cuts: {method} {statistics.mean(by_seed):.1%}; the recipe's lead {100 * mean:+.1f} points "
            f"({100 * low:+.1f} to {100 * high:+.1f}, over cuts)"
        )


def main(
    seeds: int = 5,
    methods: tuple[str, ...] = tuple(METHODS),
    per_class: tuple[int, ...] = PER_CLASS,
    shared: Path = Path("../shared"),
    results: Path = Path("benchmarks/small_sets.json"),
) -> None:
    """Compare methods on cuts.

    Args:
        seeds: runs of each method on each cut, each with its own images.
        methods: any of `METHODS`; "recipe" among them.
        per_class: images of each class.
        shared: folder with `data` and `models`.
        results: file of finished runs.
    """
    weights, finished = dinov2_in(shared), Finished(results.resolve())
    top1: dict[str, dict[str, list[float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        sources = divide_all(shared, Path(folder))
        for seed, count, classes, (name, side) in product(range(seeds), per_class, CLASSES, SIDES.items()):
            of_cut = min(classes, len(list((sources[name] / "train").iterdir())))
            title = f"{name}, {of_cut} classes, {count} images each"
            data = cut(sources[name], Path(folder) / f"{title} {seed}", classes, count, seed)
            images = sum(1 for _ in (data / "train").rglob("*.*"))
            epochs = max(EPOCHS, math.ceil(SAMPLES / images))
            if images < 0.95 * of_cut * count:  # the source has fewer: the same images as in a smaller cut
                continue
            for method in methods:
                run = partial(METHODS[method], data, weights, side, epochs, seed)
                _, score = finished.get(f"{title}: {method} {seed}", run)
                top1.setdefault(title, {}).setdefault(method, []).append(score)
    print_table(top1, methods)
    print_result("small_sets", top1=top1)


if __name__ == "__main__":
    tyro.cli(main)
