"""Run by torchrun in each rank: evaluates and predicts, and writes the results to a folder. See test_evaluation.py.

The working folder is that of a trained run. Arguments: the folder for results; numbers of images in lists.
"""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import eval as evaluation
import predict
from utils.evaluation.corruptions import CORRUPTIONS
from utils.runs.checkpoint import BEST, LAST, find_checkpoint
from utils.system.runtime import runtime

BATCH = 8
"""Images of predictions in a batch, so that each rank has several."""


def any_level(pixels: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """A corruption that makes an image dark or light, which depends on the seed."""
    return np.full_like(pixels, generator.integers(256))


def evaluate(out: Path, counts: tuple[int, ...]) -> None:
    """Evaluate lists, with OOD images of which one is unreadable, and compare two checkpoints."""
    options = {"num_workers": 0, "batch_size": 4}
    ood = str(out.parent / "ood")
    for count in counts:
        data = str(out.parent / f"list-{count}.txt")
        evaluation.main(data=data, out=str(out / f"{count} images"), ood=ood, corrupted=count // 2, **options)
    pair = (str(find_checkpoint("", BEST)), str(find_checkpoint("", LAST)))
    evaluation.main(compare=pair, out=str(out / "comparison"), data="cls_train.txt", **options)


def predict_all(out: Path) -> None:
    """Predict to standard output with copies of the images, and to a file."""
    paths = ("datasets/test", "missing.png", "datasets/train/light", "datasets/train/dark/0*.png")
    copies = {"save": str(out / "saved"), "sort_into": str(out / "sorted")}
    printed = out / "printed.txt" if runtime.is_main else Path(os.devnull)
    with printed.open("w", encoding="utf-8") as file, contextlib.redirect_stdout(file):
        print(predict.main(paths, json_lines=True, **copies))
    predict.main(paths, csv_lines=True, out=str(out / "all.csv"), reject_below="auto")


def run_all(out: Path, counts: tuple[int, ...]) -> None:
    """Write everything to `out`."""
    torch.set_num_threads(1)
    if runtime.is_main:
        out.mkdir()
    with patch.dict(CORRUPTIONS, {"any level": any_level}):
        evaluate(out, counts)
    predict_all(out)


if __name__ == "__main__":
    predict.BATCH = BATCH
    with runtime.joined():
        run_all(Path(sys.argv[1]), tuple(map(int, sys.argv[2:])))
