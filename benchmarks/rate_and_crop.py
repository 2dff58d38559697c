"""Compare learning rates and crops for the recipe, by test accuracy.

    python benchmarks/rate_and_crop.py [--seeds 2 --results FILE]

Every third training image serves for testing, as in best_epoch.py. Apart from learning rate and crop, runs have
`recipe="auto"`, and start from DINOv2's ViT-S/14. Rates and crops take turns. Finished runs are kept in `--results` and
not repeated. The last line is JSON.
"""

from __future__ import annotations

import statistics
import tempfile
from functools import partial
from itertools import product
from pathlib import Path

import tyro
from accuracy import auto_config, dinov2_in, train_and_test
from best_epoch import divide_all
from measure import Finished, print_result
from time_to_accuracy import in_temporary_folder

RUNS = {"trashnet": (112, 5), "sign_digits": (70, 3), "cifar10": (70, 5)}
"""Image size and epochs for each data set."""
RATES = (1e-3, 2e-3, 4e-3, 8e-3)
CROPS = (0.08, 0.3)


def main(seeds: int = 2, shared: Path = Path("../shared"), results: Path = Path("rate_and_crop.json")) -> None:
    """Compare rates and crops.

    Args:
        seeds: runs of each combination.
        shared: folder with `data` and `models`.
        results: file of finished runs.
    """
    weights = dinov2_in(shared)
    finished = Finished(results.resolve())
    top1: dict[str, dict[str, list[float]]] = {name: {} for name in RUNS}
    with tempfile.TemporaryDirectory() as folder:
        folders = divide_all(shared, Path(folder))
        for seed, (name, (side, epochs)), rate, crop in product(range(seeds), RUNS.items(), RATES, CROPS):
            kind = f"init_lr={rate:g} train_crop={crop:g}"
            config = auto_config(weights, side, epochs, seed, init_lr=rate, train_crop=crop)
            run = partial(in_temporary_folder, train_and_test, config, folders[name])
            _, score = finished.get(f"{name} {kind} {seed}", run)
            top1[name].setdefault(kind, []).append(score)
    for name, by_kind in top1.items():
        for kind, scores in by_kind.items():
            print(f"{name:<12}{kind:<32}{statistics.mean(scores):.1%} ({min(scores):.1%} to {max(scores):.1%})")
    print_result("rate_and_crop", top1=top1)


if __name__ == "__main__":
    tyro.cli(main)
