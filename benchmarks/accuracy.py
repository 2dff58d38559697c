"""Test accuracy within a time limit: Thaw's `recipe="auto"` against timm, fastai, and logistic regression.

    python benchmarks/accuracy.py [--minutes 2 5 10 --seeds 3 --results FILE]

All methods start from the same weights, DINOv2's ViT-S/14 in `../shared/models`, with the same images, machine and
time limit, which covers everything except building and testing the network. Methods that train use the same image
size, the largest of 112, 168 and 224 pixels at which three epochs of each fit, and as many epochs as fit; both are
measured beforehand. Runs that exceed the limit by more than a tenth are reported.

Test images select nothing within a run: Thaw holds out a tenth of the training images; the others train on all of them
and are tested at the end. (The recipe's learning rate and crop were first chosen on test images of trashnet with
time_to_accuracy.py, then checked on training images of all three data sets with rate_and_crop.py; the rule for the best
epoch with best_epoch.py.) timm runs twice, with its usual augmentation and with as little as the recipe's. Logistic
regression is the same for every seed, on the largest images that fit.

Methods take turns. Finished runs are kept in `--results` and not repeated, so a table can be made in several parts on
machines of the same speed. The last line is JSON.
"""

from __future__ import annotations

import contextlib
import shutil
import statistics
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from measure import DEVICE, PRECISION, Finished, print_result
from scipy import stats
from sklearn.linear_model import LogisticRegressionCV
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler
from time_to_accuracy import (
    BATCH,
    MEAN,
    STD,
    annotate_by_seed,
    build_timm,
    in_temporary_folder,
    run_timm,
    test_thaw,
    timm_loaders,
)
from torch import nn

import train
from utils.config.train_config import TrainConfig
from utils.modeling.precision import autocast
from utils.runs.checkpoint import BEST, LAST, load_checkpoint

SIZES = (112, 168, 224)
MIN_EPOCHS = 3
FEWEST_EPOCHS = {"thaw": 1, "timm": 1, "timm, mild": 1, "fastai": 2}  # fastai's first is frozen
DATA = ("trashnet", "sign_digits", "cifar10")
CIFAR_TRAIN, CIFAR_TEST = 100, 100  # images per class

Result = tuple[float, float]
"""Seconds and test accuracy of a run."""
Epochs = dict[str, int]
"""Epochs of each method that has epochs."""


def run_timm_usual(data: Path, weights: Path, side: int, epochs: int, seed: int) -> Result:
    """timm's components in a plain loop, with the augmentation that timm uses for fine-tuning."""
    return run_timm(data, weights, side, seed, 1, epochs)


def run_timm_mild(data: Path, weights: Path, side: int, epochs: int, seed: int) -> Result:
    """The same with as little augmentation as Thaw's recipe."""
    return run_timm(data, weights, side, seed, 1, epochs, **MILD)


MILD = {"scale": (0.3, 1.0), "color_jitter": None}
"""As little augmentation as Thaw's recipe has."""


def run_timm_probed(data: Path, weights: Path, side: int, epochs: int, seed: int) -> Result:
    """The same, starting from the head of a logistic regression (LP-FT: Kumar et al., 2022)."""

    @torch.no_grad()
    def init_head(model: nn.Module) -> None:
        loader, _ = timm_loaders(data, side, workers=1)
        head, model.head = model.head, nn.Identity()
        regression = fit_regression(model.eval(), loader)
        model.head = head
        scaler, last = regression[0], regression[-1]
        weight, bias = last.coef_ / scaler.scale_, last.intercept_
        if len(weight) == 1:  # two classes: scikit-learn only has a row for the second
            weight, bias = np.concatenate([-weight, weight]) / 2, np.concatenate([-bias, bias]) / 2
        head.weight.copy_(torch.from_numpy(weight))
        head.bias.copy_(torch.from_numpy(bias - weight @ scaler.mean_))

    return run_timm(data, weights, side, seed, 1, epochs, init_head, **MILD)


class Cast(nn.Module):
    """A network in the precision of the other methods; fastai only uses autocast on GPUs."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with autocast(DEVICE, PRECISION):
            return self.network(x).float()


def run_fastai(data: Path, weights: Path, side: int, epochs: int, seed: int) -> Result:
    """fastai's `fine_tune`, whose first epoch is frozen, with its usual learning rates and transforms."""
    from fastai.vision.all import (
        Callback,
        CancelValidException,
        CrossEntropyLossFlat,
        ImageDataLoaders,
        Learner,
        Normalize,
        Resize,
        aug_transforms,
        set_seed,
    )

    set_seed(seed)
    transforms = [*aug_transforms(size=side), Normalize.from_stats(MEAN, STD)]
    options = {"item_tfms": Resize(round(side / 0.875)), "batch_tfms": transforms, "num_workers": 1}
    options["bs"] = min(BATCH, sum(path.is_file() for path in (data / "train").rglob("*")))
    images = ImageDataLoaders.from_folder(data, train="train", valid="test", device=DEVICE, **options)
    model = Cast(build_timm(weights, side, len(images.vocab)))

    def split(model: Cast) -> list[list[nn.Parameter]]:
        head = list(model.network.head.parameters())
        return [[p for p in model.parameters() if not any(p is other for other in head)], head]

    class Unvalidated(Callback):
        """Skips fastai's evaluation of the test images after each epoch."""

        def before_validate(self) -> None:
            raise CancelValidException

    learner = Learner(images, model, loss_func=CrossEntropyLossFlat(), splitter=split)
    with learner.no_bar(), learner.no_logging():
        started = time.perf_counter()
        learner.fine_tune(max(1, epochs - 1), cbs=Unvalidated())
        seconds = time.perf_counter() - started
        logits, targets = learner.get_preds(dl=images.valid)
    return seconds, float((logits.argmax(1) == targets).float().mean())


def run_logistic(data: Path, weights: Path, side: int, epochs: int, seed: int) -> Result:
    """Logistic regression on the class token of the pretrained network, its penalty chosen by cross-validation."""
    torch.manual_seed(seed)
    loader, test_loader = timm_loaders(data, side, workers=1)
    model = build_timm(weights, side, 0).eval()
    started = time.perf_counter()
    regression = fit_regression(model, loader)
    seconds = time.perf_counter() - started
    return seconds, float(regression.score(*features(model, test_loader)))


def fit_regression(model: nn.Module, loader: Any) -> Pipeline:
    """Logistic regression on the features of the images, with five folds, or as many as the smallest class allows."""
    x, y = features(model, loader)
    folds = min(5, int(np.bincount(y).min()))
    return make_pipeline(StandardScaler(), LogisticRegressionCV(Cs=8, cv=folds, max_iter=1000)).fit(x, y)


@torch.inference_mode()
def features(model: nn.Module, loader: Any) -> tuple[np.ndarray, np.ndarray]:
    """Features (N, C) of the images, and class ids (N,)."""
    rows, targets = [], []
    for pixels, batch_targets in loader:
        with autocast(DEVICE, PRECISION):
            rows.append(model(pixels.to(DEVICE)).float().cpu())
        targets.append(batch_targets)
    return torch.cat(rows).numpy(), torch.cat(targets).numpy()


def auto_config(weights: Path, side: int, epochs: int, seed: int, **changes: Any) -> TrainConfig:
    """Settings with `recipe="auto"`, except for the epochs and `changes`."""
    return TrainConfig(
        recipe="auto",
        backbone="vit_s_14",
        model_path=str(weights),
        activation="gelu",  # like mean and deviation, from the README of the weights
        image_mean=MEAN,
        image_std=STD,
        input_shape=(side, side),
        unfreeze_epoch=epochs,
        num_workers=1,
        seed=seed,
        **changes,
    )


def train_and_test(config: TrainConfig, data: Path) -> Result:
    """Time `train.py`, then test the best checkpoint; the working folder must be empty."""
    with Path("log.txt").open("w") as log, contextlib.redirect_stdout(log):
        annotate_by_seed(data, config.seed)
        started = time.perf_counter()
        train.main(config)
        seconds = time.perf_counter() - started
    (run,) = Path(config.save_dir).iterdir()
    assert load_checkpoint(run / LAST)["epoch"] == config.unfreeze_epoch
    return seconds, test_thaw(run / BEST)


def run_thaw(data: Path, weights: Path, side: int, epochs: int, seed: int) -> Result:
    """`train.py` with `recipe="auto"`."""
    return in_temporary_folder(train_and_test, auto_config(weights, side, epochs, seed), data)


METHODS: dict[str, Callable[[Path, Path, int, int, int], Result]] = {
    "thaw": run_thaw,
    "timm": run_timm_usual,
    "timm, mild": run_timm_mild,
    "fastai": run_fastai,
    "logistic": run_logistic,
}


def dinov2_in(shared: Path) -> Path:
    """The file of the pretrained weights; exit if there is none."""
    weights = (shared / "models/dinov2_vits14_saliency_fp16.safetensors").resolve()
    if not weights.is_file():
        sys.exit(f"{weights}: not found; set --shared to the folder with data and models")
    return weights


def unpack_cifar(tar: Path, folder: Path, train_images: int = CIFAR_TRAIN) -> Path:
    """Extract the first images by name of each class of CIFAR-10 to `train` and `test` in `folder`."""
    counts: dict[tuple[str, str], int] = {}
    with tarfile.open(tar) as archive:
        for member in sorted(filter(tarfile.TarInfo.isfile, archive), key=lambda member: member.name):
            *_, split, name, file = Path(member.name).parts
            limit = train_images if split == "train" else CIFAR_TEST
            if counts.setdefault((split, name), 0) < limit:
                counts[split, name] += 1
                path = folder / split / name / file
                path.parent.mkdir(parents=True, exist_ok=True)
                with path.open("wb") as copy:
                    shutil.copyfileobj(archive.extractfile(member), copy)
    return folder


def pace(name: str, method: str, side: int, epochs: int) -> str:
    """The key of a run that measures the time of so many epochs."""
    return f"{epochs} epochs of {side} pixels: {name} {method}"


def fit(finished: Finished, name: str, run: Callable[[str, int, int], Result], seconds: float) -> tuple[int, Epochs]:
    """The largest image size at which `MIN_EPOCHS` of every method fit into the limit, else the smallest size, and the
    epochs of each method that fit. The time of an epoch is measured by the fewest possible epochs and one more. The
    slowest method goes first: if it doesn't fit, the others needn't be measured."""

    def measured(method: str, side: int, epochs: int) -> float:
        return finished.get(pace(name, method, side, epochs), lambda: run(method, side, epochs))[0]

    an_epoch = dict.fromkeys(FEWEST_EPOCHS, 1.0)
    chosen: tuple[int, Epochs] = SIZES[0], {}
    for side in SIZES:
        epochs = dict(FEWEST_EPOCHS)
        for method, fewest in sorted(FEWEST_EPOCHS.items(), key=lambda item: -an_epoch[item[0]]):
            first = measured(method, side, fewest)
            left = seconds - first
            # An epoch takes at least as long as with smaller images: if that is too long, skip the second run.
            if left > 0 and (side == SIZES[0] or left >= (MIN_EPOCHS - fewest) * an_epoch[method]):
                an_epoch[method] = max(1.0, measured(method, side, fewest + 1) - first)
                epochs[method] += int(left / an_epoch[method])
            if side > SIZES[0] and epochs[method] < MIN_EPOCHS:
                return chosen
        chosen = side, epochs
    return chosen


def fit_logistic(finished: Finished, name: str, run: Callable[[str, int, int], Result], seconds: float) -> int:
    """The largest image size at which the logistic regression fits, else the smallest."""
    chosen = SIZES[0]
    for side in SIZES:
        if finished.get(pace(name, "logistic", side, 0), lambda side=side: run("logistic", side, 0))[0] > seconds:
            break
        chosen = side
    return chosen


def plan(
    finished: Finished, name: str, run: Callable[[str, int, int], Result], minutes: float, method: str
) -> tuple[int, int]:
    """The image size and the epochs of a method within the limit; logistic regression has 0 epochs."""
    if method == "logistic":
        return fit_logistic(finished, name, run, 60 * minutes), 0
    side, epochs = fit(finished, name, run, 60 * minutes)
    return side, epochs[method]


def run_one(finished: Finished, name: str, data: Path, weights: Path, minutes: float, method: str, seed: int) -> None:
    """Do one run of the table."""

    def run(method: str, side: int, epochs: int, seed: int = 0) -> Result:
        return METHODS[method](data, weights, side, epochs, seed)

    key = f"{name} {minutes:g} {method} {seed}"
    side, epochs = plan(finished, name, run, minutes, method)
    print(f"{key}: {epochs} epochs of {side} pixels", flush=True)
    if method == "logistic":  # the seed changes nothing: reuse the run that measured the time
        finished.get(key, lambda: finished.runs[pace(name, method, side, 0)])
    else:
        finished.get(key, lambda: run(method, side, epochs, seed))


def results_of(finished: Finished, chosen: list[tuple[str, float, str]], seeds: int) -> Iterator[dict[str, Any]]:
    """A row of the table for each data set, time and method."""

    def run(*pace: object) -> Result:
        raise AssertionError(f"this run must be finished: {pace}")

    for name, minutes, method in chosen:
        side, epochs = plan(finished, name, run, minutes, method)
        runs = [finished.runs[f"{name} {minutes:g} {method} {seed}"] for seed in range(seeds)]
        scores = [score for _, score in runs]
        spread = statistics.stdev(scores) if seeds > 1 else 0.0
        late = sum(seconds > 66 * minutes for seconds, _ in runs)
        row = {"data": name, "minutes": minutes, "method": method, "mean": statistics.mean(scores), "std": spread}
        row |= {"n": seeds, "side": side, "epochs": epochs, "late": late}
        yield row | {"seconds": [round(seconds) for seconds, _ in runs]}


def differences(finished: Finished, chosen: list[tuple[str, float, str]], seeds: int) -> Iterator[dict[str, Any]]:
    """Mean difference of accuracy between Thaw and each peer over the seeds, with Student's 95 % interval. It doesn't
    cover the choice of the test images, which are the same for both."""
    for name, minutes, peer in chosen:
        if peer == "thaw":
            continue
        gains = [
            finished.runs[f"{name} {minutes:g} thaw {seed}"][1] - finished.runs[f"{name} {minutes:g} {peer} {seed}"][1]
            for seed in range(seeds)
        ]
        mean = statistics.mean(gains)
        margin = stats.t.ppf(0.975, seeds - 1) * statistics.stdev(gains) / seeds**0.5
        interval = {"mean": mean, "low": mean - margin, "high": mean + margin}
        yield {"data": name, "minutes": minutes, "peer": peer} | interval


def main(
    data: tuple[str, ...] = DATA,
    minutes: tuple[float, ...] = (2, 5, 10),
    methods: tuple[str, ...] = tuple(METHODS),
    seeds: int = 3,
    shared: Path = Path("../shared"),
    results: Path = Path("accuracy.json"),
) -> None:
    """Compare the accuracies.

    Args:
        data: any of trashnet, sign_digits and cifar10.
        minutes: time limits.
        methods: any of `METHODS`.
        seeds: runs of each.
        shared: folder with `data` and `models`.
        results: file of finished runs.
    """
    weights = dinov2_in(shared)
    finished = Finished(results.resolve())
    with tempfile.TemporaryDirectory() as folder:
        folders = {name: (shared / "data" / name).resolve() for name in data}
        if "cifar10" in folders:
            folders["cifar10"] = unpack_cifar(shared / "data/cifar10.tar", Path(folder, "cifar10"))
        chosen = list(product(folders, minutes, methods))
        for seed, (name, limit, method) in product(range(seeds), chosen):
            if f"{name} {limit:g} {method} {seed}" not in finished.runs:
                run_one(finished, name, folders[name], weights, limit, method, seed)
    table = list(results_of(finished, chosen, seeds))
    for row in table:
        line = f"{row['data']:<12}{row['minutes']:>4g} min  {row['method']:<11}{row['mean']:7.1%} ± {row['std']:.1%}"
        line += f"  ({row['epochs']} epochs of {row['side']} pixels)"
        print(line + f", {row['late']} of {row['n']} exceeded the limit" * (row["late"] > 0))
    gains = list(differences(finished, chosen, seeds)) if seeds > 1 and "thaw" in methods else []
    for row in gains:
        line = f"{row['data']:<12}{row['minutes']:>4g} min  thaw - {row['peer']:<11}{100 * row['mean']:+6.1f} points"
        print(f"{line} ({100 * row['low']:+.1f} to {100 * row['high']:+.1f})")
    print_result("accuracy", results=table, differences=gains)


if __name__ == "__main__":
    tyro.cli(main)
