"""Run by torchrun in each rank: trains several runs and writes digests of their results. See test_one_result.py.

Arguments: the folder of the lists, the file to write, a JSON list of scenarios.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import train
from tests.conftest import TINY, settings
from tests.faults.harness import digest
from utils.config.train_config import StageConfig
from utils.data.image_list import list_in_memory
from utils.inference.classifier import load_classifier
from utils.inference.outputs import compute_outputs
from utils.runs.checkpoint import LAST, load_checkpoint
from utils.runs.setup import prepare
from utils.system.runtime import runtime
from utils.training.sharding import gather_shards
from utils.training.trainer import Trainer

SHORT = TINY | {
    "unfreeze_epoch": 2,
    "freeze_epoch": 1,
    "parts": 4,
    "ema_decay": 0.9,
    "clip_grad": 1.0,
    "recipe": "none",
}
RESIZED = (
    StageConfig(epochs=1, frozen="all", batch_size=8, input_shape=(8, 8)),
    StageConfig(epochs=1, frozen=4, batch_size=8, input_shape=(8, 8)),
    StageConfig(epochs=1, frozen="nothing", batch_size=6),
)
SCENARIOS: dict[str, dict] = {
    "freeze, thaw, resize": SHORT | {"stages": RESIZED, "input_shape": (12, 12)},
    "cached features, probe": SHORT
    | {"cache_features": True, "feature_views": 2, "freeze_epoch": 3, "unfreeze_epoch": 4}
    | {"head_init": "probe", "freeze_blocks": "all"},
    "balanced, mixup, uneven parts": SHORT
    | {"sampler": "balanced", "mixup": 0.2, "cutmix": 1.0, "parts": 5}
    | {"freeze_batch_size": 8, "unfreeze_batch_size": 7},
    "batch norm": SHORT
    | {"backbone": "resnet18", "input_shape": (32, 32), "freeze_train": False, "unfreeze_epoch": 1, "ema_decay": 0.0}
    | {"unfreeze_batch_size": 16},
    "skipped step": SHORT | {"on_nan": "skip", "class_weights": "balanced", "freeze_train": False, "unfreeze_epoch": 1},
    "divided weights": SHORT
    | {"stages": RESIZED, "input_shape": (12, 12), "shard": "yes", "cache_features": False}
    | {"divide_checkpoints": "yes"},
    "bf16, image cache": SHORT
    | {"precision": "bf16", "cache_images": True, "unfreeze_epoch": 1, "freeze_train": False},
}
LISTS = (7, 33, 301)
"""Images in the lists that are evaluated."""


def digest_run(folder: Path) -> str:
    """A digest of everything that a run has computed."""
    checkpoint = load_checkpoint(folder / LAST)
    names = ("weights", "weights_in_training", "optimizer", "step", "calibration", "finished")
    history = [{k: v for k, v in row.items() if k not in ("seconds", "time")} for row in checkpoint["history"]]
    return digest([history, *(checkpoint[name] for name in names)])


def fail_third_step(accumulate: Callable) -> Callable:
    """Make the loss of part 1 of the third step NaN."""

    def accumulate_nan(self: Trainer, batch: object, seed: int, *args: object) -> tuple:
        loss, hits = accumulate(self, batch, seed, *args)
        nan = float("nan") if self.step == 2 and seed == self._seed("step", 1) else 0.0
        return loss + nan, hits

    return accumulate_nan


def run_all(project: Path, names: Sequence[str], with_fast: bool) -> dict[str, Any]:
    """The digests of scenarios and of outputs, and weights of `run_fast`."""
    found = {}
    for name in names:
        changes = SCENARIOS[name]
        folder = Path(f"logs-{name.partition(',')[0]}")
        original = Trainer._accumulate_gradients
        if name == "skipped step":
            Trainer._accumulate_gradients = fail_third_step(original)
        try:
            train.main(settings(**changes, data=str(project), save_dir=str(folder), cache_dir=f"{folder}/cache"))
        finally:
            Trainer._accumulate_gradients = original
        if runtime.is_main:
            (run,) = (path.parent for path in folder.glob(f"*/{LAST}"))
            found[name] = digest_run(run)
    if with_fast:
        found["fast"] = run_fast(project, shard="no")
        found["fast, divided"] = run_fast(project, shard="yes")
    classifier = load_classifier(runtime.first(lambda: next(Path(f"logs-{names[0].partition(',')[0]}").glob("*/"))))
    paths = sorted((project / "datasets").rglob("*.png"))
    for count in LISTS:
        images = list_in_memory((0, str(paths[i % len(paths)])) for i in range(count))
        outputs = compute_outputs(classifier, images, num_workers=0)
        found[f"{count} images"] = digest(list(outputs))
    return found


def run_fast(project: Path, shard: str) -> list[float]:
    """Some weights after a run in which torch adds the gradients, through freezing and thawing; all ranks have the
    same."""
    changes = SHORT | {"parts": 5, "reduce": "fast", "shard": shard, "data": str(project), "save_dir": f"logs-{shard}"}
    run = train.start_and_train(prepare(settings(**changes, cache_dir="cache")))
    weights = gather_shards(dict(run.model.state_dict()))
    runtime.check_same({"weights": digest(weights)})
    return [float(weight.flatten()[0]) for weight in weights.values()]


if __name__ == "__main__":
    torch.set_num_threads(1)
    with runtime.joined():
        digests = run_all(Path(sys.argv[1]), json.loads(sys.argv[3]), with_fast=True)
        if runtime.is_main:
            Path(sys.argv[2]).write_text(json.dumps(digests), encoding="utf-8")
