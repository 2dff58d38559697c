"""Runs that are killed and started again, and what is compared of them."""

from __future__ import annotations

import hashlib
import multiprocessing
import shutil
from pathlib import Path
from typing import Any

import torch

from tests.conftest import SHARED, write_image
from tests.faults import trainee
from utils.data.image_list import write_classes, write_list
from utils.runs.checkpoint import BEST, LAST, load_checkpoint

SETTINGS: dict[str, Any] = {
    "backbone": "vit_xs_4",
    "input_shape": (32, 32),
    "freeze_epoch": 2,
    "freeze_blocks": 4,
    "unfreeze_epoch": 3,
    "freeze_batch_size": 8,
    "unfreeze_batch_size": 8,
    "feature_views": 1,  # so that the frozen stage learns from cached features
    "init_lr": 4e-3,
    "min_lr": 4e-5,
    "ema_decay": 0.9,
    "num_workers": 0,
    "save_period": 1,
    "keep_periodic": 1,
    "save_every_steps": 2,
    "device": "cpu",  # a GPU's sums vary
    "precision": "fp32",
}
"""Augmentation, dropout, stochastic depth, an average of the weights, both stages, a schedule."""
TRAIN, VAL = 36, 8

context = multiprocessing.get_context("forkserver")
# Besides the trainee what it imports late, so that a run is killed in its training, not while it still imports.
context.set_forkserver_preload(
    ["tests.faults.trainee", "torch._dynamo", "torch.utils.tensorboard", "utils.runs.curves", "sklearn.covariance"]
)


def prepare(folder: Path, data: str) -> Path:
    """A working folder with lists of images of three classes: of the shared set `data`, or made if there is none."""
    folder.mkdir(parents=True)
    source = SHARED / "data" / data / "train"
    names = ["0", "3", "8"]
    entries = []
    for class_id, name in enumerate(names):
        if source.is_dir():
            paths = [str(path) for path in sorted((source / name).iterdir())[: TRAIN + VAL]]
        else:
            made = (folder / "images" / name / f"{i:02d}.png" for i in range(TRAIN + VAL))
            paths = [str(write_image(path, 60 + 60 * class_id, seed=i)) for i, path in enumerate(made)]
        entries += [(class_id, path) for path in paths]
    write_list(folder / "cls_train.txt", entries[::3][:TRAIN])
    write_list(folder / "cls_val.txt", entries[1::3][:VAL] + entries[-VAL // 2 :])
    write_classes(folder / "model_data" / "cls_classes.txt", names)
    return folder


def start(folder: Path, settings: dict[str, Any] | None = None, fault: str = "", number: int = 0):
    """Start a run in `folder`, or go on with the one that is there."""
    process = context.Process(target=trainee.train_in, args=(folder, SETTINGS | (settings or {}), fault, number))
    process.start()
    return process


def finish(folder: Path, settings: dict[str, Any] | None = None) -> None:
    """Let the run in `folder` come to its end."""
    process = start(folder, settings)
    process.join(120)
    assert process.exitcode == 0, (folder / "output.log").read_text()[-3000:]


def run_folder(folder: Path) -> Path:
    """The one that was begun; a kill may leave an empty one from just before."""
    (found,) = (path for path in (folder / "logs").iterdir() if any(path.iterdir()))
    return found


def digest(content: Any) -> str:
    """SHA-256 over all tensors and numbers in nested dicts and lists, in the order of their keys."""
    sha = hashlib.sha256()

    def walk(value: Any) -> None:
        if isinstance(value, torch.Tensor):
            sha.update(repr(value.shape).encode() + value.contiguous().numpy().tobytes())
        elif isinstance(value, dict):
            for key in sorted(value, key=str):
                sha.update(str(key).encode())
                walk(value[key])
        elif isinstance(value, list | tuple):
            for item in value:
                walk(item)
        else:
            sha.update(repr(value).encode())

    walk(content)
    return sha.hexdigest()


def outcome(folder: Path) -> dict[str, str]:
    """What a finished run came to: its checkpoints without times and settings, and what each step learned from."""
    found = {}
    for name in (BEST, LAST):
        content = load_checkpoint(run_folder(folder) / name)
        keys = ("weights", "weights_in_training", "optimizer", "step", "epoch", "best_val_loss", "scaler")
        keys += ("calibration", "finished")
        rows = [{k: v for k, v in row.items() if k not in ("seconds", "time")} for row in content["history"]]
        found[name] = digest([{key: content[key] for key in keys}, rows])
    return found | {"steps": digest(sorted(steps(folder).items()))}


def steps(folder: Path) -> dict[int, str]:
    """What each step was given; done again after a kill, it was given the same."""
    given: dict[int, str] = {}
    for line in read_steps(folder):
        number, what = line.split(" ", 1)
        assert given.setdefault(int(number), what) == what, f"step {number} was given something else"
    return given


def read_steps(folder: Path) -> list[str]:
    path = folder / trainee.STEPS
    return path.read_text().splitlines() if path.is_file() else []


def last_step(folder: Path) -> int:
    """The number of the last step that was done, -1 if none was."""
    lines = read_steps(folder)
    return int(lines[-1].split()[0]) if lines else -1


def copy(source: Path, target: Path) -> Path:
    shutil.copytree(source, target)
    return target
