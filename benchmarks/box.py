"""What the network in the box is worth: runs from it against runs from scratch, on few images and on more.

    python benchmarks/box.py [--seeds 3 --results FILE]

The built-in digits, and the signs in `../shared` where they are, at 32 x 32 pixels, with a tenth, half and all of the
training images. Both sides have the CONFIG of `train.py` but for its epochs, which are 20, or so many that the steps
are as many, up to 60; from scratch nothing is frozen. A tenth of the training images chooses the best epoch; test
images are looked at once. Runs take turns; what is finished is kept in `--results` and not done again. The last line
is JSON.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
import statistics
import sys
import time
from itertools import product
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
import tyro
from measure import Finished, machine
from time_to_accuracy import in_folder_of_its_own, test_thaw

import train
from utils.annotation.annotate import annotate
from utils.annotation.demo_digits import write_demo
from utils.runs.checkpoint import BEST

FRACTIONS = (0.1, 0.5, 1.0)
EPOCHS, MAX_EPOCHS = 20, 60
FROZEN = 0.2  # of the epochs, from the box


def run(data: Path | None, fraction: float, from_box: bool, seed: int) -> tuple[float, float]:
    """Seconds and test accuracy of a run on a part of the training images of `data`, or of the digits."""
    if data:
        shutil.copytree(data, "datasets")
    else:
        write_demo("datasets")
    for folder in Path("datasets/train").iterdir():
        images = sorted(folder.iterdir())
        kept = max(2, round(fraction * len(images)))
        for i in np.random.default_rng(seed).permutation(len(images))[kept:]:
            images[i].unlink()
    epochs = min(MAX_EPOCHS, round(EPOCHS / fraction))
    config = dataclasses.replace(
        train.CONFIG,
        pretrained=from_box,
        freeze_train=from_box,
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


def main(seeds: int = 3, shared: Path = Path("../shared"), results: Path = Path("box.json")) -> None:
    """Compare the starts.

    Args:
        seeds: runs of each; they choose the images too.
        shared: the folder with `data/sign_digits`.
        results: file of the runs that are finished.
    """
    signs = (shared / "data/sign_digits").resolve()
    places = {"digits": None} | ({"sign_digits": signs} if signs.is_dir() else {})
    finished = Finished(results.resolve())
    starts = {"scratch": False, "box": True}
    for seed, name, fraction, start in product(range(seeds), places, FRACTIONS, starts):
        finished.get(
            f"{name} {fraction:g} {start} {seed}",
            lambda n=name, f=fraction, s=start, x=seed: in_folder_of_its_own(run, places[n], f, starts[s], x),
        )
    table = []
    for name, fraction in product(places, FRACTIONS):
        row = {"data": name, "fraction": fraction}
        for start in starts:
            scores = [finished.runs[f"{name} {fraction:g} {start} {seed}"][1] for seed in range(seeds)]
            row |= {start: statistics.mean(scores), f"{start}_std": statistics.stdev(scores) if seeds > 1 else 0.0}
        table.append(row)
        told = (f"{start} {row[start]:.1%} ± {row[f'{start}_std']:.1%}" for start in starts)
        print(f"{name:<12}{fraction:4.0%}  {'  '.join(told)}")
    print(json.dumps({"benchmark": "box", "results": table, "machine": machine(), "torch": torch.__version__}))


if __name__ == "__main__":
    tyro.cli(main)
