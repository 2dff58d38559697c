"""Test accuracy of small networks with and without a teacher, and of training with unlabeled images.

    python benchmarks/distillation.py [--seeds 3 --results FILE]

Every third training image of trashnet and sign_digits serves for testing, as in best_epoch.py. The teacher is DINOv2's
ViT-S/14 with `recipe="auto"`. Students: resnet18 from scratch, and the bundled vit_xs_4. For unlabeled images, ten
images of each class are labeled and the others are not: a ViT-S/14 trained on the ten alone is the teacher of another.
Finished runs are kept in `--results` and not repeated. The last line is JSON.
"""

from __future__ import annotations

import contextlib
import statistics
import tempfile
import time
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import tyro
from accuracy import Result, auto_config, dinov2_in
from best_epoch import divide_all
from measure import Finished, print_result
from time_to_accuracy import annotate_by_seed, in_temporary_folder, test_thaw

import train
from utils.config.train_config import TrainConfig
from utils.runs.checkpoint import BEST

SIDES = {"trashnet": 112, "sign_digits": 70}
EPOCHS = 5
LABELED = 10
"""Labeled images of each class beside unlabeled ones."""
STUDENTS: dict[str, dict[str, Any]] = {
    "resnet18": {"backbone": "resnet18", "input_shape": (64, 64), "unfreeze_epoch": 30},
    "vit_xs_4": {"backbone": "vit_xs_4", "input_shape": (32, 32), "pretrained": True, "unfreeze_epoch": 10},
}


def train_run(config: TrainConfig) -> Path:
    """Train in the working folder, which has the lists; return the best checkpoint."""
    with Path("log.txt").open("a") as log, contextlib.redirect_stdout(log):
        train.main(config)
    return max(Path(config.save_dir).iterdir(), key=lambda folder: folder.stat().st_mtime_ns) / BEST


def student(name: str, seed: int, teacher: str) -> TrainConfig:
    """The settings of a student; `teacher`: empty for none."""
    options = {"recipe": "auto", "num_workers": 1, "save_dir": "students", "distill_from": teacher, "seed": seed}
    return TrainConfig(**options | STUDENTS[name])


def run_students(data: Path, weights: Path, side: int, seed: int, finished: Finished, title: str) -> None:
    """Train the teacher, and each student without and with it."""
    annotate_by_seed(data, seed)
    teacher: list[Path] = []

    def timed(config: TrainConfig) -> Result:
        started = time.perf_counter()
        best = train_run(config)
        return time.perf_counter() - started, test_thaw(best)

    def with_teacher(name: str) -> Result:
        if not teacher:
            teacher.append(train_run(auto_config(weights, side, EPOCHS, seed)))
        return timed(student(name, seed, str(teacher[0])))

    for name in STUDENTS:
        finished.get(f"{title}: {name} alone {seed}", lambda name=name: timed(student(name, seed, "")))
        finished.get(f"{title}: {name} with a teacher {seed}", lambda name=name: with_teacher(name))


def divide_labeled(data: Path, folder: Path) -> tuple[Path, Path]:
    """Link `LABELED` training images of each class and all test images to one folder, the other ones to another."""
    labeled, unlabeled = folder / "labeled", folder / "unlabeled"
    for image in sorted(data.glob("*/*/*")):
        *_, split, name, _ = image.parts
        place = labeled / split / name
        if split == "train" and place.is_dir() and len(list(place.iterdir())) >= LABELED:
            place = unlabeled
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{name}_{image.name}").symlink_to(image.resolve())
    return labeled, unlabeled


def run_unlabeled(data: Path, weights: Path, side: int, seed: int, finished: Finished, title: str) -> None:
    """Train on the labeled images; then with that network as the teacher, without and with the unlabeled images."""
    labeled, unlabeled = divide_labeled(data, Path("divided"))
    annotate_by_seed(labeled.resolve(), seed)

    def run(**changes: Any) -> Result:
        started = time.perf_counter()
        best = train_run(auto_config(weights, side, EPOCHS, seed, **changes))
        return time.perf_counter() - started, test_thaw(best)

    finished.get(f"{title}: labeled alone {seed}", run)
    if not Path("logs").is_dir():  # the run is in the results, but not in this folder
        train_run(auto_config(weights, side, EPOCHS, seed))
    (teacher,) = map(str, Path("logs").iterdir())
    finished.get(f"{title}: with a teacher {seed}", partial(run, distill_from=teacher, save_dir="again"))
    more = {"distill_from": teacher, "save_dir": "more", "unlabeled": str(unlabeled)}
    finished.get(f"{title}: with a teacher and unlabeled images {seed}", partial(run, **more))


def main(
    seeds: int = 3, shared: Path = Path("../shared"), results: Path = Path("benchmarks/distillation.json")
) -> None:
    """Compare runs with and without a teacher.

    Args:
        seeds: runs of each.
        shared: folder with `data` and `models`.
        results: file of finished runs.
    """
    weights, finished = dinov2_in(shared), Finished(results.resolve())
    with tempfile.TemporaryDirectory() as folder:
        sources = divide_all(shared, Path(folder))
        for seed, (name, side) in product(range(seeds), SIDES.items()):
            for run in (run_unlabeled, run_students):
                in_temporary_folder(run, sources[name], weights, side, seed, finished, name)
    top1: dict[str, list[float]] = {}
    for key, (_, score) in finished.runs.items():
        top1.setdefault(key.rpartition(" ")[0], []).append(score)
    for title, scores in top1.items():
        spread = statistics.stdev(scores) if len(scores) > 1 else 0.0
        print(f"{title:<60}{statistics.mean(scores):7.1%} ± {spread:.1%}, {len(scores)} runs")
    print_result("distillation", top1=top1)


if __name__ == "__main__":
    tyro.cli(main)
