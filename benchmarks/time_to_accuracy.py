"""Time to reach a test accuracy: Thaw against fine-tuning with timm, from the same weights, on the same images.

    python benchmarks/time_to_accuracy.py [--data FOLDER --weights FILE]

timm fine-tunes for 12 epochs with its own transforms, loader, optimizer (AdamW, 1e-4, layer decay 0.75) and cosine
schedule, batch size 16, in bf16 if the hardware supports it; only training is timed. Thaw runs `train.py` with the
settings of `recipe`, a tenth of the training images held out; the whole run is timed, and its best checkpoint tested.
The fraction of the time is null if Thaw's mean accuracy is below timm's. Both take turns. The last line is JSON.
"""

from __future__ import annotations

import contextlib
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import timm
import torch
import torch.nn.functional as F
import tyro
from measure import DEVICE, PRECISION, print_ratios
from timm.data import create_dataset, create_loader
from timm.models.vision_transformer import checkpoint_filter_fn
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from torch import nn

import train
from utils.annotation.annotate import annotate
from utils.config.train_config import TrainConfig
from utils.data.dataset import FileSource, ImageDataset
from utils.data.image_list import read_list
from utils.data.loader import eval_loader
from utils.inference.classifier import load_classifier
from utils.metrics.classification import top_k_accuracy
from utils.modeling.precision import autocast
from utils.runs.checkpoint import BEST
from utils.training.predict_logits import predict_logits

EPOCHS, BATCH = 12, 16
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
Result = TypeVar("Result")
USUAL = {"auto_augment": "original"}
"""timm's augmentation for fine-tuning."""


def timm_loaders(data: Path, side: int, workers: int, **augmentation: object) -> tuple[object, object]:
    """timm's loaders of the training images, with `augmentation` if there is any, and of the test images."""
    train_set, test_set = (create_dataset("", root=str(data / split)) for split in ("train", "test"))
    options = {"input_size": (3, side, side), "mean": MEAN, "std": STD, "num_workers": workers, "device": DEVICE}
    options |= {"batch_size": min(BATCH, len(train_set)), "use_prefetcher": False, "crop_pct": 0.875}
    loader = create_loader(train_set, is_training=bool(augmentation), **options, **augmentation)
    return loader, create_loader(test_set, is_training=False, **options)


def build_timm(weights: Path, side: int, classes: int) -> nn.Module:
    """timm's network with the weights and a new head."""
    model = timm.create_model("vit_small_patch14_dinov2", num_classes=0, img_size=side)
    timm.models.load_checkpoint(model, str(weights), filter_fn=checkpoint_filter_fn)
    model.reset_classifier(classes)
    return model.to(DEVICE)


def run_timm(
    data: Path,
    weights: Path,
    side: int,
    seed: int,
    workers: int,
    epochs: int = EPOCHS,
    init_head: Callable[[nn.Module], None] = lambda _: None,
    **augmentation: object,
) -> tuple[float, float]:
    """Seconds of training, with `init_head`, which gives the network its first head, and the final test accuracy."""
    torch.manual_seed(seed)
    loader, test_loader = timm_loaders(data, side, workers, **(augmentation or USUAL))
    model = build_timm(weights, side, len(loader.dataset.reader.class_to_idx))
    started = time.perf_counter()
    init_head(model)
    optimizer = create_optimizer_v2(model, opt="adamw", lr=1e-4, weight_decay=0.05, layer_decay=0.75)
    steps = len(loader)
    warm = min(steps, epochs * steps // EPOCHS + 1)
    warm_up = {"warmup_t": warm, "warmup_lr_init": 1e-6, "warmup_prefix": True}
    schedule = CosineLRScheduler(optimizer, epochs * steps - warm, lr_min=1e-6, t_in_epochs=False, **warm_up)
    for epoch in range(epochs):
        model.train()
        for i, (pixels, targets) in enumerate(loader):
            schedule.step_update(epoch * steps + i)
            with autocast(DEVICE, PRECISION):
                loss = F.cross_entropy(model(pixels.to(DEVICE)), targets.to(DEVICE))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    seconds = time.perf_counter() - started
    return seconds, test_timm(model, test_loader)


@torch.inference_mode()
def test_timm(model: nn.Module, loader: object) -> float:
    """Test accuracy of timm's network."""
    model.eval()
    correct, count = 0, 0
    for pixels, targets in loader:
        with autocast(DEVICE, PRECISION):
            correct += int((model(pixels.to(DEVICE)).argmax(1).cpu() == targets).sum())
        count += len(targets)
    return correct / count


def recipe(weights: Path, side: int, seed: int, workers: int) -> TrainConfig:
    """Thaw's settings: a probe in place of the frozen stage, since the pretrained features are good."""
    return TrainConfig(
        backbone="vit_s_14",
        model_path=str(weights),
        activation="gelu",
        input_shape=(side, side),
        image_mean=MEAN,
        image_std=STD,
        drop_rate=0.0,
        attn_drop_rate=0.0,
        drop_path_rate=0.0,
        head_init="probe",
        freeze_train=False,
        unfreeze_epoch=5,
        unfreeze_batch_size=BATCH,
        init_lr=4e-3,  # for 256 images per step: 2.5e-4 for 16
        min_lr=4e-5,
        layer_decay=0.7,
        train_crop=0.3,  # the run is too short for small crops
        augmentation="none",
        num_workers=workers,
        save_period=1,
        seed=seed,
    )


def run_thaw(data: Path, config: TrainConfig) -> tuple[float, float, list[tuple[float, float]]]:
    """Seconds of the whole run and test accuracy of the best checkpoint, then both after each epoch."""
    with Path("log.txt").open("w") as log, contextlib.redirect_stdout(log):
        annotate_by_seed(data, config.seed)
        started = time.time()
        train.main(config)
        seconds = time.time() - started
    (run,) = Path(config.save_dir).iterdir()
    epochs = [(file.stat().st_mtime - started, test_thaw(file)) for file in sorted(run.glob("ep0*.safetensors"))]
    return seconds, test_thaw(run / BEST), epochs


def test_thaw(checkpoint: Path) -> float:
    """Test accuracy of a checkpoint of Thaw."""
    classifier = load_classifier(checkpoint)
    images = read_list("cls_test.txt", len(classifier.class_names))
    dataset = ImageDataset(FileSource(images, classifier.preprocessing), classifier.transform, seed=0)
    loader = eval_loader(dataset, 32, num_workers=0)
    return top_k_accuracy(*predict_logits(classifier.network, loader, classifier.device, classifier.precision), 1)


def in_temporary_folder(function: Callable[..., Result], *args: object) -> Result:
    """Call `function` in an empty working folder and delete it."""
    before = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            return function(*args)
        finally:
            os.chdir(before)


def annotate_by_seed(data: Path, seed: int) -> None:
    """Write lists of `data` in the empty working folder."""
    # A link, since the split depends on the paths, and `data` may be in a temporary folder.
    Path("datasets").symlink_to(data, target_is_directory=True)
    annotate("datasets", seed=seed, audit=False)


def main(
    data: Path = Path("../shared/data/trashnet"),
    weights: Path = Path("../shared/models/dinov2_vits14_saliency_fp16.safetensors"),
    side: int = 224,
    repeats: int = 3,
    workers: int = 1,
) -> None:
    """Compare the times.

    Args:
        data: folder with `train` and `test`, each with a folder of images per class.
        weights: DINOv2's ViT-S/14, with timm's tensor names.
        side: height and width of the images, a multiple of 14.
        repeats: runs of each, with different seeds; times are compared by median, accuracies by mean.
        workers: processes that load images.
    """
    for path in (data, weights):
        if not path.exists():
            sys.exit(f"{path}: not found; set --data FOLDER and --weights FILE")
    data, weights = data.resolve(), weights.resolve()
    timm_runs, thaw_runs = [], []
    for seed in range(repeats):
        seconds, top1 = run_timm(data, weights, side, seed, workers)
        timm_runs.append((seconds, top1))
        print(f"seed {seed}: timm {seconds:6.0f} s, test top-1 {top1:.1%}", flush=True)
        seconds, top1, epochs = in_temporary_folder(run_thaw, data, recipe(weights, side, seed, workers))
        thaw_runs.append((seconds, top1))
        course = ", ".join(f"{score:.1%} at {passed:.0f} s" for passed, score in epochs)
        print(f"seed {seed}: Thaw {seconds:6.0f} s, test top-1 {top1:.1%} ({course})", flush=True)
    runs = {"timm": timm_runs, "thaw": thaw_runs}
    seconds = {name: statistics.median(run[0] for run in runs[name]) for name in runs}
    top1 = {name: statistics.mean(run[1] for run in runs[name]) for name in runs}
    ratio = seconds["thaw"] / seconds["timm"] if top1["thaw"] >= top1["timm"] else None
    figures = {f"{name}_top1": top1[name] for name in runs} | {f"{name}_seconds": seconds[name] for name in runs}
    ratios = {"time_fraction_of_timm": ratio}
    print_ratios("time_to_accuracy", ratios, side=side, precision=PRECISION, runs=runs, **figures)


if __name__ == "__main__":
    tyro.cli(main)
