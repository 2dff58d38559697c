"""Compare rules that select the best epoch, by test accuracy.

    python benchmarks/best_epoch.py [--seeds 2]

Every third training image of each data set serves for testing; the data sets' own test images aren't used. Runs have
`recipe="auto"` and start from DINOv2's ViT-S/14. The rules see the tenth of the remaining images that is held out for
validation. The last line is JSON.
"""

from __future__ import annotations

import contextlib
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from itertools import product
from pathlib import Path

import tyro
from accuracy import auto_config, dinov2_in, unpack_cifar
from measure import print_result
from time_to_accuracy import annotate_by_seed, in_temporary_folder, test_thaw

import train
from utils.config.train_config import TrainConfig
from utils.runs.checkpoint import LAST, load_checkpoint
from utils.runs.history import select_best

RUNS = {"trashnet": (112, 8), "sign_digits": (70, 3), "cifar10": (70, 6)}
"""Image size and epochs for each data set."""

Row = Mapping[str, float]
"""An epoch in the history of a run, with `test_top1`."""

RULES: dict[str, Callable[[TrainConfig, Sequence[Row]], Row]] = {
    "lowest loss": lambda _, rows: min(rows, key=lambda row: row["val_loss"]),
    "lowest calibrated loss": lambda _, rows: min(rows, key=lambda row: row["val_calibrated_loss"]),
    "highest top-1": lambda _, rows: max(rows, key=lambda row: (row["val_top1"], row["epoch"])),
    "as Thaw does": lambda config, rows: rows[select_best(rows, config.epoch_shapes)],
    "the last": lambda _, rows: rows[-1],
}


def divide(source: Path, folder: Path) -> Path:
    """Link every third image of each class in `source/train` to `folder/test`, the others to `folder/train`."""
    for class_folder in (source / "train").iterdir():
        for i, image in enumerate(sorted(class_folder.iterdir())):
            link = folder / ("test" if i % 3 == 2 else "train") / class_folder.name / image.name
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(image)
    return folder


def divide_all(shared: Path, folder: Path) -> dict[str, Path]:
    """Divide the training images of each data set; return its folder in `folder`."""
    sources = {name: (shared / "data" / name).resolve() for name in ("trashnet", "sign_digits")}
    sources["cifar10"] = unpack_cifar(shared / "data/cifar10.tar", folder / "cifar10")
    return {name: divide(source, folder / "divided" / name) for name, source in sources.items()}


def run(config: TrainConfig, data: Path) -> tuple[TrainConfig, list[Row]]:
    """Train; return the settings with the recipe's choices, and the history with the test accuracy of each epoch."""
    with Path("log.txt").open("w") as log, contextlib.redirect_stdout(log):
        annotate_by_seed(data, config.seed)
        train.main(config)
    (folder,) = Path(config.save_dir).iterdir()
    last = load_checkpoint(folder / LAST)
    scores = [test_thaw(checkpoint) for checkpoint in sorted(folder.glob("ep*.safetensors"))]
    rows = [row | {"test_top1": score} for row, score in zip(last["history"][1:], scores, strict=True)]
    return TrainConfig.from_dict(last["config"]), rows


def main(seeds: int = 2, shared: Path = Path("../shared")) -> None:
    """Compare the rules.

    Args:
        seeds: runs for each data set.
        shared: folder with `data` and `models`.
    """
    weights = dinov2_in(shared)
    top1: dict[str, dict[str, list[float]]] = {name: {rule: [] for rule in RULES} for name in RUNS}
    with tempfile.TemporaryDirectory() as folder:
        folders = divide_all(shared, Path(folder))
        for seed, (name, (side, epochs)) in product(range(seeds), RUNS.items()):
            config = auto_config(weights, side, epochs, seed, save_period=1, keep_periodic=epochs)
            resolved, rows = in_temporary_folder(run, config, folders[name])
            print(f"{name} {seed}: test top-1 {[round(row['test_top1'], 3) for row in rows]}", flush=True)
            for rule, choose in RULES.items():
                top1[name][rule].append(choose(resolved, rows)["test_top1"])
    for name, by_rule in top1.items():
        print(f"{name}: " + ", ".join(f"{rule} {statistics.mean(scores):.1%}" for rule, scores in by_rule.items()))
    print_result("best_epoch", top1=top1)


if __name__ == "__main__":
    tyro.cli(main)
