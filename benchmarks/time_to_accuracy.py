"""Time to a test accuracy: Thaw's run against a fine-tuning loop of timm's parts, same weights, same images, in turn.

    python benchmarks/time_to_accuracy.py [--data FOLDER --weights FILE]

timm fine-tunes for 12 epochs with its own transforms, loader, optimizer (AdamW, 1e-4, layer decay 0.75), cosine
schedule and batch of 16, in bf16 where there is bf16 in hardware; only its training is timed. Thaw runs `train.py` as
`recipe` says, with a tenth of the training images taken out to validate on; all of it is timed, and its best
checkpoint, by validation, is tested. The fraction of the time is given if the mean accuracy isn't below timm's. The
last line is JSON.
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

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import timm
import torch
import torch.nn.functional as F
import tyro
from measure import DEVICE, PRECISION, finish
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
"""How timm augments for fine-tuning."""


def timm_loaders(data: Path, side: int, workers: int, **augmentation: object) -> tuple[object, object]:
    """timm's loaders of the training images, augmented if told how, and of the test images."""
    options = {"input_size": (3, side, side), "batch_size": BATCH, "mean": MEAN, "std": STD, "num_workers": workers}
    options |= {"device": DEVICE, "use_prefetcher": False, "crop_pct": 0.875}
    train_set, test_set = (create_dataset("", root=str(data / split)) for split in ("train", "test"))
    loader = create_loader(train_set, is_training=bool(augmentation), **options, **augmentation)
    return loader, create_loader(test_set, is_training=False, **options)


def build_timm(weights: Path, side: int, classes: int) -> nn.Module:
    """timm's network with the weights and a new head."""
    model = timm.create_model("vit_small_patch14_dinov2", num_classes=0, img_size=side)
    timm.models.load_checkpoint(model, str(weights), filter_fn=checkpoint_filter_fn)
    model.reset_classifier(classes)
    return model.to(DEVICE)


def run_timm(
    data: Path, weights: Path, side: int, seed: int, workers: int, epochs: int = EPOCHS, **augmentation: object
) -> tuple[float, float]:
    """Seconds of training and the test accuracy at its end."""
    torch.manual_seed(seed)
    loader, test_loader = timm_loaders(data, side, workers, **(augmentation or USUAL))
    model = build_timm(weights, side, len(loader.dataset.reader.class_to_idx))
    optimizer = create_optimizer_v2(model, opt="adamw", lr=1e-4, weight_decay=0.05, layer_decay=0.75)
    steps = len(loader)
    warm = min(steps, epochs * steps // EPOCHS + 1)
    warm_up = {"warmup_t": warm, "warmup_lr_init": 1e-6, "warmup_prefix": True}
    schedule = CosineLRScheduler(optimizer, epochs * steps - warm, lr_min=1e-6, t_in_epochs=False, **warm_up)
    started = time.perf_counter()
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
    """The part of the test images that timm's network gets right."""
    model.eval()
    right, count = 0, 0
    for pixels, targets in loader:
        with autocast(DEVICE, PRECISION):
            right += int((model(pixels.to(DEVICE)).argmax(1).cpu() == targets).sum())
        count += len(targets)
    return right / count


def recipe(weights: Path, side: int, seed: int, workers: int) -> TrainConfig:
    """What Thaw is told. The first stage is the probe: with weights as good as these, all the rest is spent thawed."""
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
        init_lr=4e-3,  # for 256 images a step: 2.5e-4 for 16
        min_lr=4e-5,
        layer_decay=0.7,
        train_crop=0.3,  # a short run has no time for harder images
        augmentation="none",
        num_workers=workers,
        save_period=1,
        seed=seed,
    )


def run_thaw(data: Path, config: TrainConfig) -> tuple[float, float, list[tuple[float, float]]]:
    """Seconds of the whole run, the test accuracy of its best checkpoint, and both after each epoch."""
    with Path("log.txt").open("w") as log, contextlib.redirect_stdout(log):
        annotate_by_seed(data, config.seed)
        started = time.time()
        train.main(config)
        seconds = time.time() - started
    (run,) = Path(config.save_dir).iterdir()
    epochs = [(file.stat().st_mtime - started, test_thaw(file)) for file in sorted(run.glob("ep0*.pth"))]
    return seconds, test_thaw(run / BEST), epochs


def test_thaw(checkpoint: Path) -> float:
    """The part of the test images that a checkpoint of Thaw gets right."""
    classifier = load_classifier(checkpoint)
    images = read_list("cls_test.txt", len(classifier.class_names))
    dataset = ImageDataset(FileSource(images, classifier.preprocessing), classifier.transform, seed=0)
    loader = eval_loader(dataset, 32, num_workers=0)
    return top_k_accuracy(*predict_logits(classifier.network, loader, classifier.device, classifier.precision), 1)


def in_folder_of_its_own(function: Callable[..., Result], *args: object) -> Result:
    """Call `function` with an empty working folder, which then goes."""
    before = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            return function(*args)
        finally:
            os.chdir(before)


def annotate_by_seed(data: Path, seed: int) -> None:
    """Lists of `data` in the working folder, which is empty. The seed alone says which images are for validation:
    they are drawn by path, too, and that of `data` may be of a temporary folder."""
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
        data: a folder with `train` and `test`, each with a folder of images per class.
        weights: of DINOv2's ViT-S/14, in timm's names.
        side: of the images, a multiple of 14.
        repeats: runs of each, in turn, with other seeds; the medians of the times, the means of the accuracies count.
        workers: processes that load images, for both.
    """
    for path in (data, weights):
        if not path.exists():
            sys.exit(f"there is no {path}: give --data FOLDER and --weights FILE")
    data, weights = data.resolve(), weights.resolve()
    peer, own, courses = [], [], []
    for seed in range(repeats):
        peer.append(run_timm(data, weights, side, seed, workers))
        print(f"seed {seed}: timm {peer[-1][0]:6.0f} s, test top-1 {peer[-1][1]:.1%}", flush=True)
        *result, course = in_folder_of_its_own(run_thaw, data, recipe(weights, side, seed, workers))
        own.append(result)
        courses.append(course)
        told = ", ".join(f"{top1:.1%} at {seconds:.0f} s" for seconds, top1 in course)
        print(f"seed {seed}: Thaw {own[-1][0]:6.0f} s, test top-1 {own[-1][1]:.1%} ({told})", flush=True)
    target = statistics.mean(top1 for _, top1 in peer)
    reached = statistics.mean(top1 for _, top1 in own)
    seconds, own_seconds = (statistics.median(found[0] for found in runs) for runs in (peer, own))
    figures = {"timm_top1": target, "thaw_top1": reached, "timm_seconds": seconds, "thaw_seconds": own_seconds}
    ratios = {"time_fraction_of_timm": own_seconds / seconds if reached >= target else None}
    finish("time_to_accuracy", ratios, side=side, precision=PRECISION, runs={"timm": peer, "thaw": own}, **figures)


if __name__ == "__main__":
    tyro.cli(main)
