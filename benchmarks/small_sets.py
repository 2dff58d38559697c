"""Test accuracy on small sets: the recipe at several learning rates, logistic regression on the features, timm.

    python benchmarks/small_sets.py [--seeds 3 --results FILE]

Sets are cut from the training images of trashnet, sign_digits and cifar10: some classes, some images of each, which
depend on the seed. Every third training image serves for testing, as in best_epoch.py. All methods start from DINOv2's
ViT-S/14 and have the same images, size and epochs. Methods take turns. Finished runs are kept in `--results` and not
repeated. The last line is JSON.
"""

from __future__ import annotations

import random
import statistics
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from pathlib import Path

import tyro
from accuracy import Result, auto_config, dinov2_in, run_logistic, run_timm_mild, train_and_test
from best_epoch import divide_all
from measure import Finished, print_result
from time_to_accuracy import in_temporary_folder

SIDES = {"trashnet": 112, "sign_digits": 70, "cifar10": 70}
EPOCHS = 5
CLASSES = (2, 10)
"""Classes of a cut; trashnet has 6."""
PER_CLASS = (5, 20, 50)
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


def run_thaw(data: Path, weights: Path, side: int, epochs: int, seed: int, rate: float | None) -> Result:
    """`train.py` with the recipe, or with another learning rate."""
    changes = {} if rate is None else {"init_lr": rate}
    return in_temporary_folder(train_and_test, auto_config(weights, side, epochs, seed, **changes), data)


def main(
    seeds: int = 2,
    rates: Sequence[float] = (2.5e-4, 1e-3),
    timm: bool = False,
    shared: Path = Path("../shared"),
    results: Path = Path("benchmarks/small_sets.json"),
) -> None:
    """Compare methods on cuts.

    Args:
        seeds: runs of each method on each cut.
        rates: values of init_lr besides the recipe's.
        timm: also run timm's plain loop with mild augmentation.
        shared: folder with `data` and `models`.
        results: file of finished runs.
    """
    weights, finished = dinov2_in(shared), Finished(results.resolve())
    methods: dict[str, Callable[..., Result]] = {"regression": run_logistic, "recipe": partial(run_thaw, rate=None)}
    methods |= {f"init_lr={rate:g}": partial(run_thaw, rate=rate) for rate in rates}
    methods |= {"timm, mild": run_timm_mild} if timm else {}
    top1: dict[str, dict[str, list[float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        sources = divide_all(shared, Path(folder))
        for seed, per_class, classes, (name, side) in product(range(seeds), PER_CLASS, CLASSES, SIDES.items()):
            title = f"{name}, {classes} classes, {per_class} images each"
            data = cut(sources[name], Path(folder) / f"{title} {seed}", classes, per_class, seed)
            for method, run in methods.items():
                call = partial(run, data, weights, side, EPOCHS, seed)
                _, score = finished.get(f"{title}: {method} {seed}", call)
                top1.setdefault(title, {}).setdefault(method, []).append(score)
    for title, by_method in top1.items():
        shown = ", ".join(f"{method} {statistics.mean(scores):.1%}" for method, scores in by_method.items())
        print(f"{title}: {shown}")
    means = {method: statistics.mean(statistics.mean(cuts[method]) for cuts in top1.values()) for method in methods}
    print("mean over cuts: " + ", ".join(f"{method} {mean:.1%}" for method, mean in means.items()))
    print_result("small_sets", top1=top1)


if __name__ == "__main__":
    tyro.cli(main)
