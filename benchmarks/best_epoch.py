"""Which epoch of a run to take: test accuracy by ways of choosing it, on training images alone.

    python benchmarks/best_epoch.py [--seeds 2]

Of the training images of each data set every third is put aside to test; the data sets' own test images have no
part in it. Runs are as `recipe="auto"` has them, from DINOv2's ViT-S/14. A tenth of what they train on is put aside
once more, to choose by: by the lowest loss, by the lowest loss at the temperature that suits it best, by the highest
top-1 (of equal ones the latest), as Thaw does (see `TrainConfig.best_epoch`), or not at all, which takes the last
epoch. The last line is JSON.
"""

from __future__ import annotations

import contextlib
import json
import statistics
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from itertools import product
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import tyro
from accuracy import auto_config, dinov2_in, unpack_cifar
from measure import machine
from time_to_accuracy import annotate_by_seed, in_folder_of_its_own, test_thaw

import train
from utils.config.train_config import TrainConfig
from utils.runs.checkpoint import LAST, load_checkpoint

RUNS = {"trashnet": (112, 8), "sign_digits": (70, 3), "cifar10": (70, 6)}
"""Side of the images and epochs of the runs on each data set."""

Row = Mapping[str, float]
"""An epoch of a run's history, with its `test_top1`."""

RULES: dict[str, Callable[[TrainConfig, Sequence[Row]], Row]] = {
    "lowest loss": lambda _, rows: min(rows, key=lambda row: row["val_loss"]),
    "lowest calibrated loss": lambda _, rows: min(rows, key=lambda row: row["val_calibrated_loss"]),
    "highest top-1": lambda _, rows: max(rows, key=lambda row: (row["val_top1"], row["epoch"])),
    "as Thaw does": lambda config, rows: rows[config.best_epoch(rows)],
    "the last": lambda _, rows: rows[-1],
}


def divide(source: Path, folder: Path) -> Path:
    """Links to the images of `source/train`, every third of a class under `test` in `folder`, the others under
    `train`."""
    for of_class in (source / "train").iterdir():
        for i, image in enumerate(sorted(of_class.iterdir())):
            place = folder / ("test" if i % 3 == 2 else "train") / of_class.name / image.name
            place.parent.mkdir(parents=True, exist_ok=True)
            place.symlink_to(image)
    return folder


def divided(shared: Path, folder: Path) -> dict[str, Path]:
    """Where in `folder` each data set lies, its training images divided."""
    sources = {name: (shared / "data" / name).resolve() for name in ("trashnet", "sign_digits")}
    sources["cifar10"] = unpack_cifar(shared / "data/cifar10.tar", folder / "cifar10")
    return {name: divide(source, folder / "divided" / name) for name, source in sources.items()}


def run(config: TrainConfig, data: Path) -> tuple[TrainConfig, list[Row]]:
    """The settings of a run, its recipe's among them, and its history, with the test accuracy of each epoch."""
    with Path("log.txt").open("w") as log, contextlib.redirect_stdout(log):
        annotate_by_seed(data, config.seed)
        train.main(config)
    (folder,) = Path(config.save_dir).iterdir()
    last = load_checkpoint(folder / LAST)
    scores = [test_thaw(checkpoint) for checkpoint in sorted(folder.glob("ep*.pth"))]
    rows = [row | {"test_top1": score} for row, score in zip(last["history"], scores, strict=True)]
    return TrainConfig.from_dict(last["config"]), rows


def main(seeds: int = 2, shared: Path = Path("../shared")) -> None:
    """Compare the ways of choosing.

    Args:
        seeds: runs of each kind.
        shared: the folder with `data` and `models`.
    """
    weights = dinov2_in(shared)
    found: dict[str, dict[str, list[float]]] = {name: {rule: [] for rule in RULES} for name in RUNS}
    with tempfile.TemporaryDirectory() as folder:
        places = divided(shared, Path(folder))
        for seed, (name, (side, epochs)) in product(range(seeds), RUNS.items()):
            config = auto_config(weights, side, epochs, seed, save_period=1, keep_periodic=epochs)
            resolved, rows = in_folder_of_its_own(run, config, places[name])
            print(f"{name} {seed}: test top-1 {[round(row['test_top1'], 3) for row in rows]}", flush=True)
            for rule, choose in RULES.items():
                found[name][rule].append(choose(resolved, rows)["test_top1"])
    for name, by_rule in found.items():
        told = ", ".join(f"{rule} {statistics.mean(scores):.1%}" for rule, scores in by_rule.items())
        print(f"{name}: {told}")
    print(json.dumps({"benchmark": "best_epoch", "top1": found, "machine": machine(), "torch": torch.__version__}))


if __name__ == "__main__":
    tyro.cli(main)
