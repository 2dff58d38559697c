"""Which learning rate and which crop the recipe should have: test accuracy by each, on training images alone.

    python benchmarks/rate_and_crop.py [--seeds 2 --results FILE]

Test images are every third of the training images, as in best_epoch.py; the data sets' own have no part in it.
Runs are as `recipe="auto"` has them, from DINOv2's ViT-S/14, besides rate and crop. They take turns by rate and crop;
what is finished is kept in `--results` and not done again. The last line is JSON.
"""

from __future__ import annotations

import json
import statistics
import tempfile
from functools import partial
from itertools import product
from pathlib import Path

import torch
import tyro
from accuracy import auto_config, dinov2_in, train_and_test
from best_epoch import divided
from measure import Finished, machine
from time_to_accuracy import in_folder_of_its_own

RUNS = {"trashnet": (112, 5), "sign_digits": (70, 3), "cifar10": (70, 5)}
"""Side of the images and epochs of the runs on each data set."""
RATES = (1e-3, 2e-3, 4e-3, 8e-3)
CROPS = (0.08, 0.3)


def main(seeds: int = 2, shared: Path = Path("../shared"), results: Path = Path("rate_and_crop.json")) -> None:
    """Compare rates and crops.

    Args:
        seeds: runs of each kind.
        shared: the folder with `data` and `models`.
        results: file of the runs that are finished.
    """
    weights = dinov2_in(shared)
    finished = Finished(results.resolve())
    found: dict[str, dict[str, list[float]]] = {name: {} for name in RUNS}
    with tempfile.TemporaryDirectory() as folder:
        places = divided(shared, Path(folder))
        for seed, (name, (side, epochs)), rate, crop in product(range(seeds), RUNS.items(), RATES, CROPS):
            kind = f"init_lr={rate:g} train_crop={crop:g}"
            config = auto_config(weights, side, epochs, seed, init_lr=rate, train_crop=crop)
            run = partial(in_folder_of_its_own, train_and_test, config, places[name])
            _, score = finished.get(f"{name} {kind} {seed}", run)
            found[name].setdefault(kind, []).append(score)
    for name, by_kind in found.items():
        for kind, scores in by_kind.items():
            print(f"{name:<12}{kind:<32}{statistics.mean(scores):.1%} ({min(scores):.1%} to {max(scores):.1%})")
    print(json.dumps({"benchmark": "rate_and_crop", "top1": found, "machine": machine(), "torch": torch.__version__}))


if __name__ == "__main__":
    tyro.cli(main)
