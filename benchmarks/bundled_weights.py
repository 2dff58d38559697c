"""Compare runs from the bundled weights with runs from scratch, on a tenth, half and all of the training images.

    python benchmarks/bundled_weights.py [--seeds 3 --results FILE]

Data are the built-in digits, and sign_digits if it is in `../shared`, at 32 x 32 pixels. Both starts use the CONFIG of
`train.py`, with 20 epochs, or up to 60 to keep the number of steps; from scratch nothing is frozen. A tenth of the
training images selects the best epoch, which is tested. Starts take turns. Finished runs are kept in `--results` and
not repeated. The last line is JSON.
"""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
import statistics
import time
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
import tyro
from measure import Finished, print_result
from time_to_accuracy import in_temporary_folder, test_thaw

import train
from utils.annotation.annotate import annotate
from utils.annotation.demo_digits import write_demo
from utils.runs.checkpoint import BEST

FRACTIONS = (0.1, 0.5, 1.0)
EPOCHS, MAX_EPOCHS = 20, 60
FROZEN = 0.2  # share of the epochs, with bundled weights


def run(data: Path | None, fraction: float, bundled: bool, seed: int) -> tuple[float, float]:
    """Seconds and test accuracy of a run on a fraction of the training images of `data`, or of the digits."""
    if data:
        shutil.copytree(data, "datasets")
    else:
        write_demo("datasets")
    for folder in Path("datasets/train").iterdir():
        images = sorted(folder.iterdir())
        count = max(2, round(fraction * len(images)))
        for i in np.random.default_rng(seed).permutation(len(images))[count:]:
            images[i].unlink()
    epochs = min(MAX_EPOCHS, round(EPOCHS / fraction))
    config = dataclasses.replace(
        train.CONFIG,
        pretrained=bundled,
        freeze_train=bundled,
        freeze_epoch=round(epochs * FROZEN),
        unfreeze_epoch=epochs,
        seed=seed,
    )
    with Path("log.txt").open("w") as log, contextlib.redirect_stdout(log):
        annotate("datasets", seed=seed, audit=False)
        started = time.perf_counter()
        train.main(config)
        seconds = time.perf_counter() - started
    (folder,) = Path(config.save_dir).iterdir()
    return seconds, test_thaw(folder / BEST)


def main(seeds: int = 3, shared: Path = Path("../shared"), results: Path = Path("bundled_weights.json")) -> None:
    """Compare the starts.

    Args:
        seeds: runs of each; the seed also selects the images.
        shared: folder with `data/sign_digits`.
        results: file of finished runs.
    """
    signs = (shared / "data/sign_digits").resolve()
    folders = {"digits": None} | ({"sign_digits": signs} if signs.is_dir() else {})
    finished = Finished(results.resolve())
    starts = {"scratch": False, "bundled": True}
    for seed, name, fraction, start in product(range(seeds), folders, FRACTIONS, starts):
        finished.get(
            f"{name} {fraction:g} {start} {seed}",
            partial(in_temporary_folder, run, folders[name], fraction, starts[start], seed),
        )
    table = []
    for name, fraction in product(folders, FRACTIONS):
        row = {"data": name, "fraction": fraction}
        for start in starts:
            scores = [finished.runs[f"{name} {fraction:g} {start} {seed}"][1] for seed in range(seeds)]
            row |= {start: statistics.mean(scores), f"{start}_std": statistics.stdev(scores) if seeds > 1 else 0.0}
        table.append(row)
        parts = (f"{start} {row[start]:.1%} ± {row[f'{start}_std']:.1%}" for start in starts)
        print(f"{name:<12}{fraction:4.0%}  {'  '.join(parts)}")
    print_result("bundled weights", results=table)


if __name__ == "__main__":
    tyro.cli(main)
