"""Test accuracy after so many minutes: Thaw's `recipe="auto"` against timm's parts, fastai, and a logistic regression.

    python benchmarks/accuracy.py [--minutes 2 5 10 --seeds 3 --results FILE]

All start from the same weights, DINOv2's ViT-S/14 as it lies in `../shared/models`, and have the same images and the
same time on the same machine: for everything from the first image read to the network that is tested, besides
building it and testing it. The size of the images is the same for all that train: the largest of 112, 168 and 224
pixels at which three epochs of each fit, by what is measured beforehand. Each has as many epochs as fit there; what
runs over its time by more than a tenth is marked. Test images choose nothing within a run: Thaw takes a tenth of the
training images out for that, the others train on all of them and are tested as they end. (Of the recipe, rate and
crop were first chosen by test images of trashnet, with time_to_accuracy.py, then tried by training images of all
three, with rate_and_crop.py, like the rule for the best epoch, with best_epoch.py.) timm comes twice, with its usual
augmentation and with as little as the recipe's. The logistic regression is the same for every seed, of the largest
images that it has the time for. Runs take turns by method; what is finished is kept in `--results` and not done
again, so a table of hours may be made in parts, of which each asks for a machine of the same speed. The last line is
JSON.
"""

from __future__ import annotations

import contextlib
import json
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

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import tyro
from measure import DEVICE, PRECISION, Finished, machine
from scipy import stats
from sklearn.linear_model import LogisticRegressionCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from time_to_accuracy import (
    BATCH,
    MEAN,
    STD,
    annotate_by_seed,
    build_timm,
    in_folder_of_its_own,
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
CIFAR_TRAIN, CIFAR_TEST = 100, 100  # of each class

Result = tuple[float, float]
"""Seconds and test accuracy of a run."""
Epochs = dict[str, int]
"""Epochs of each method that has any."""


def run_timm_usual(data: Path, weights: Path, side: int, epochs: int, seed: int) -> Result:
    """timm's parts in a plain loop, with the augmentation that timm fine-tunes with."""
    return run_timm(data, weights, side, seed, 1, epochs)


def run_timm_mild(data: Path, weights: Path, side: int, epochs: int, seed: int) -> Result:
    """The same with as little augmentation as Thaw's recipe has."""
    return run_timm(data, weights, side, seed, 1, epochs, scale=(0.3, 1.0), color_jitter=None)


class Cast(nn.Module):
    """A network in the arithmetic that the others have; fastai knows of autocast on GPUs alone."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits in fp32."""
        with autocast(DEVICE, PRECISION):
            return self.network(x).float()


def run_fastai(data: Path, weights: Path, side: int, epochs: int, seed: int) -> Result:
    """fastai's `fine_tune`, of whose epochs the first is frozen, with its usual rates and transforms."""
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
    options = {"item_tfms": Resize(round(side / 0.875)), "batch_tfms": transforms, "bs": BATCH, "num_workers": 1}
    images = ImageDataLoaders.from_folder(data, train="train", valid="test", device=DEVICE, **options)
    model = Cast(build_timm(weights, side, len(images.vocab)))

    def split(model: Cast) -> list[list[nn.Parameter]]:
        head = list(model.network.head.parameters())
        return [[p for p in model.parameters() if not any(p is own for own in head)], head]

    class Unvalidated(Callback):
        """Spares fastai looking at the test images after each epoch."""

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
    """A logistic regression on the class token of the network as it is, its penalty by cross-validation."""
    torch.manual_seed(seed)
    loader, test_loader = timm_loaders(data, side, workers=1)
    model = build_timm(weights, side, 0).eval()
    started = time.perf_counter()
    regression = make_pipeline(StandardScaler(), LogisticRegressionCV(Cs=8, cv=5, max_iter=1000))
    regression.fit(*features(model, loader))
    seconds = time.perf_counter() - started
    return seconds, float(regression.score(*features(model, test_loader)))


@torch.inference_mode()
def features(model: nn.Module, loader: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """What the network makes of the images, (n, C), and their class ids (n,)."""
    rows, targets = [], []
    for pixels, batch_targets in loader:
        with autocast(DEVICE, PRECISION):
            rows.append(model(pixels.to(DEVICE)).float().cpu())
        targets.append(batch_targets)
    return torch.cat(rows).numpy(), torch.cat(targets).numpy()


def auto_config(weights: Path, side: int, epochs: int, seed: int, **changes: Any) -> TrainConfig:
    """The settings of a run of `recipe="auto"`, except for its epochs and `changes`."""
    return TrainConfig(
        recipe="auto",
        backbone="vit_s_14",
        model_path=str(weights),
        activation="gelu",  # the weights' README says so, and mean and deviation
        image_mean=MEAN,
        image_std=STD,
        input_shape=(side, side),
        unfreeze_epoch=epochs,
        num_workers=1,
        seed=seed,
        **changes,
    )


def train_and_test(config: TrainConfig, data: Path) -> Result:
    """All of `train.py` timed, then the checkpoint that did best on its validation images; the working folder is
    empty before."""
    with Path("log.txt").open("w") as log, contextlib.redirect_stdout(log):
        annotate_by_seed(data, config.seed)
        started = time.perf_counter()
        train.main(config)
        seconds = time.perf_counter() - started
    (run,) = Path(config.save_dir).iterdir()
    assert len(load_checkpoint(run / LAST)["history"]) == config.unfreeze_epoch
    return seconds, test_thaw(run / BEST)


def run_thaw(data: Path, weights: Path, side: int, epochs: int, seed: int) -> Result:
    """`train.py` with `recipe="auto"`."""
    return in_folder_of_its_own(train_and_test, auto_config(weights, side, epochs, seed), data)


METHODS: dict[str, Callable[[Path, Path, int, int, int], Result]] = {
    "thaw": run_thaw,
    "timm": run_timm_usual,
    "timm, mild": run_timm_mild,
    "fastai": run_fastai,
    "logistic": run_logistic,
}


def dinov2_in(shared: Path) -> Path:
    """The weights that all start from; without them the script ends here."""
    weights = (shared / "models/dinov2_vits14_saliency_fp16.safetensors").resolve()
    if not weights.is_file():
        sys.exit(f"there is no {weights}: give --shared FOLDER")
    return weights


def unpack_cifar(tar: Path, folder: Path) -> Path:
    """The first images by name of each class of CIFAR-10 under `train` and `test` in `folder`."""
    taken: dict[tuple[str, str], int] = {}
    with tarfile.open(tar) as archive:
        for member in sorted(filter(tarfile.TarInfo.isfile, archive), key=lambda member: member.name):
            *_, split, name, file = Path(member.name).parts
            most = CIFAR_TRAIN if split == "train" else CIFAR_TEST
            if taken.setdefault((split, name), 0) < most:
                taken[split, name] += 1
                place = folder / split / name / file
                place.parent.mkdir(parents=True, exist_ok=True)
                with place.open("wb") as written:
                    shutil.copyfileobj(archive.extractfile(member), written)
    return folder


def pace(name: str, method: str, side: int, epochs: int) -> str:
    """The name of a run that is made to learn what it takes."""
    return f"{epochs} epochs of {side} pixels: {name} {method}"


def fit(finished: Finished, name: str, run: Callable[[str, int, int], Result], seconds: float) -> tuple[int, Epochs]:
    """The largest size at which enough epochs of every method fit into so many seconds, else the smallest, and how many
    epochs each has there: by what the fewest take that it can have, and one more. The slowest method is tried first,
    since where it has no time for enough epochs the others needn't be tried."""

    def paced(method: str, side: int, epochs: int) -> float:
        return finished.get(pace(name, method, side, epochs), lambda: run(method, side, epochs))[0]

    an_epoch = dict.fromkeys(FEWEST_EPOCHS, 1.0)
    chosen: tuple[int, Epochs] = SIZES[0], {}
    for side in SIZES:
        epochs = dict(FEWEST_EPOCHS)
        for method, fewest in sorted(FEWEST_EPOCHS.items(), key=lambda item: -an_epoch[item[0]]):
            first = paced(method, side, fewest)
            left = seconds - first
            # an epoch takes no less than one of smaller images, which spares the second run where it can't be enough
            if left > 0 and (side == SIZES[0] or left >= (MIN_EPOCHS - fewest) * an_epoch[method]):
                an_epoch[method] = max(1.0, paced(method, side, fewest + 1) - first)
                epochs[method] += int(left / an_epoch[method])
            if side > SIZES[0] and epochs[method] < MIN_EPOCHS:
                return chosen
        chosen = side, epochs
    return chosen


def fit_logistic(finished: Finished, name: str, run: Callable[[str, int, int], Result], seconds: float) -> int:
    """The largest size at which the logistic regression, which has no epochs, fits, else the smallest."""
    chosen = SIZES[0]
    for side in SIZES:
        if finished.get(pace(name, "logistic", side, 0), lambda side=side: run("logistic", side, 0))[0] > seconds:
            break
        chosen = side
    return chosen


def settle(
    finished: Finished, name: str, run: Callable[[str, int, int], Result], minutes: float, method: str
) -> tuple[int, int]:
    """The size of the images and the epochs that a method has in so many minutes; the logistic regression has 0."""
    if method == "logistic":
        return fit_logistic(finished, name, run, 60 * minutes), 0
    side, epochs = fit(finished, name, run, 60 * minutes)
    return side, epochs[method]


def make(finished: Finished, name: str, data: Path, weights: Path, minutes: float, method: str, seed: int) -> None:
    """One run of the table."""

    def run(method: str, side: int, epochs: int, seed: int = 0) -> Result:
        return METHODS[method](data, weights, side, epochs, seed)

    key = f"{name} {minutes:g} {method} {seed}"
    side, epochs = settle(finished, name, run, minutes, method)
    print(f"{key}: {epochs} epochs of {side} pixels", flush=True)
    if method == "logistic":  # a seed would change nothing: the run that was made for its pace is this one
        finished.get(key, lambda: finished.runs[pace(name, method, side, 0)])
    else:
        finished.get(key, lambda: run(method, side, epochs, seed))


def results_of(finished: Finished, chosen: list[tuple[str, float, str]], seeds: int) -> Iterator[dict[str, Any]]:
    """A row of the table for each data set, time and method."""

    def run(*pace: object) -> Result:
        raise AssertionError(f"the runs are finished, and {pace} isn't")

    for name, minutes, method in chosen:
        side, epochs = settle(finished, name, run, minutes, method)
        runs = [finished.runs[f"{name} {minutes:g} {method} {seed}"] for seed in range(seeds)]
        scores = [score for _, score in runs]
        spread = statistics.stdev(scores) if seeds > 1 else 0.0
        late = sum(seconds > 66 * minutes for seconds, _ in runs)
        row = {"data": name, "minutes": minutes, "method": method, "mean": statistics.mean(scores), "std": spread}
        row |= {"n": seeds, "side": side, "epochs": epochs, "late": late}
        yield row | {"seconds": [round(seconds) for seconds, _ in runs]}


def differences(finished: Finished, chosen: list[tuple[str, float, str]], seeds: int) -> Iterator[dict[str, Any]]:
    """By how much Thaw is better than each peer, seed by seed, with Student's interval of 95 %
    over the seeds. What chance is in the test images themselves isn't in it: both sides have the same."""
    for name, minutes, peer in chosen:
        if peer == "thaw":
            continue
        apart = [
            finished.runs[f"{name} {minutes:g} thaw {seed}"][1] - finished.runs[f"{name} {minutes:g} {peer} {seed}"][1]
            for seed in range(seeds)
        ]
        mean = statistics.mean(apart)
        reach = stats.t.ppf(0.975, seeds - 1) * statistics.stdev(apart) / seeds**0.5
        yield {"data": name, "minutes": minutes, "peer": peer, "mean": mean, "low": mean - reach, "high": mean + reach}


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
        data: of trashnet, sign_digits and cifar10.
        minutes: of training.
        methods: of `METHODS`.
        seeds: runs of each.
        shared: the folder with `data` and `models`.
        results: file of the runs that are finished.
    """
    weights = dinov2_in(shared)
    finished = Finished(results.resolve())
    with tempfile.TemporaryDirectory() as folder:
        places = {name: (shared / "data" / name).resolve() for name in data}
        if "cifar10" in places:
            places["cifar10"] = unpack_cifar(shared / "data/cifar10.tar", Path(folder, "cifar10"))
        chosen = list(product(places, minutes, methods))
        for seed, (name, time_given, method) in product(range(seeds), chosen):
            if f"{name} {time_given:g} {method} {seed}" not in finished.runs:
                make(finished, name, places[name], weights, time_given, method, seed)
    table = list(results_of(finished, chosen, seeds))
    for row in table:
        told = f"{row['data']:<12}{row['minutes']:>4g} min  {row['method']:<11}{row['mean']:7.1%} ± {row['std']:.1%}"
        told += f"  ({row['epochs']} epochs of {row['side']} pixels)"
        print(told + f", {row['late']} of {row['n']} ran over their time" * (row["late"] > 0))
    apart = list(differences(finished, chosen, seeds)) if seeds > 1 and "thaw" in methods else []
    for row in apart:
        told = f"{row['data']:<12}{row['minutes']:>4g} min  thaw - {row['peer']:<11}{100 * row['mean']:+6.1f} points"
        print(f"{told} ({100 * row['low']:+.1f} to {100 * row['high']:+.1f})")
    figures = {"results": table, "differences": apart, "machine": machine(), "torch": torch.__version__}
    print(json.dumps({"benchmark": "accuracy"} | figures))


if __name__ == "__main__":
    tyro.cli(main)
