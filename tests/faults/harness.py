"""Runs that are killed and resumed, and the comparison of their results."""

from __future__ import annotations

import hashlib
import multiprocessing
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
    "feature_views": 1,  # the frozen stage trains on cached features
    "init_lr": 4e-3,
    "min_lr": 4e-5,
    "ema_decay": 0.9,
    "num_workers": 0,
    "save_period": 1,
    "keep_periodic": 1,
    "save_every_steps": 2,
    "device": "cpu",  # sums on a GPU are not deterministic
    "precision": "fp32",
}
"""With augmentation, dropout, stochastic depth, EMA, both stages and a schedule."""
TRAIN, VAL = 36, 8

context = multiprocessing.get_context("forkserver")
# Includes late imports of the trainee, so that runs are killed while training, not while importing.
context.set_forkserver_preload(
    ["tests.faults.trainee", "torch._dynamo", "torch.utils.tensorboard", "utils.runs.curves", "sklearn.covariance"]
)


def prepare(folder: Path, data: str) -> Path:
    """A working folder with lists of images of three classes, from the shared data set `data` or generated."""
    folder.mkdir(parents=True)
    source = SHARED / "data" / data / "train"
    names = ["0", "3", "8"]
    entries = []
    for class_id, name in enumerate(names):
        if source.is_dir():
            paths = [str(path) for path in sorted((source / name).iterdir())[: TRAIN + VAL]]
        else:
            generated = (folder / "images" / name / f"{i:02d}.png" for i in range(TRAIN + VAL))
            paths = [str(write_image(path, 60 + 60 * class_id, seed=i)) for i, path in enumerate(generated)]
        entries += [(class_id, path) for path in paths]
    write_list(folder / "cls_train.txt", entries[::3][:TRAIN])
    write_list(folder / "cls_val.txt", entries[1::3][:VAL] + entries[-VAL // 2 :])
    write_classes(folder / "model_data" / "cls_classes.txt", names)
    return folder


def start(folder: Path, settings: dict[str, Any] | None = None, fault: str = "", number: int = 0):
    """Start or resume a run in `folder`."""
    process = context.Process(target=trainee.train_in, args=(folder, SETTINGS | (settings or {}), fault, number))
    process.start()
    return process


def finish(folder: Path, settings: dict[str, Any] | None = None) -> None:
    """Run to the end."""
    process = start(folder, settings)
    process.join(120)
    assert process.exitcode == 0, (folder / "output.log").read_text()[-3000:]


def run_folder(folder: Path) -> Path:
    """The only run folder that isn't empty; a kill during its creation leaves an empty one."""
    (run,) = (path for path in (folder / "logs").iterdir() if any(path.iterdir()))
    return run


def digest(content: Any) -> str:
    """SHA-256 of all tensors and numbers in nested dicts and lists, in the order of their keys."""
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
    """Digests of a finished run: its checkpoints without times and settings, and the input of each step."""
    digests = {}
    for name in (BEST, LAST):
        content = load_checkpoint(run_folder(folder) / name)
        keys = ("weights", "weights_in_training", "optimizer", "step", "epoch", "best_val_loss", "scaler")
        keys += ("calibration", "finished")
        rows = [{k: v for k, v in row.items() if k not in ("seconds", "time")} for row in content["history"]]
        digests[name] = digest([{key: content[key] for key in keys}, rows])
    return digests | {"steps": digest(sorted(steps(folder).items()))}


def steps(folder: Path) -> dict[int, str]:
    """The input of each step by its number; steps repeated after a kill had the same input."""
    inputs: dict[int, str] = {}
    for line in read_steps(folder):
        number, value = line.split(" ", 1)
        assert inputs.setdefault(int(number), value) == value, f"step {number} had another input"
    return inputs


def read_steps(folder: Path) -> list[str]:
    path = folder / trainee.STEPS
    return path.read_text().splitlines() if path.is_file() else []


def last_step(folder: Path) -> int:
    """The number of the last completed step, -1 if there is none."""
    lines = read_steps(folder)
    return int(lines[-1].split()[0]) if lines else -1
