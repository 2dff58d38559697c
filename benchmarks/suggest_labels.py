"""Accuracy after labeling what `predict.py --suggest-labels` suggests, against random images and other rules.

    python benchmarks/suggest_labels.py [--seeds 10]

A simulated loop: `--start` images of each class are labeled, at random; then, `--rounds` times, `--count` of the
others are suggested, get their true label, and the head is fitted again: logistic regression on the features of
DINOv2's ViT-S/14, as with `head_init="probe"`, its penalty chosen on every fifth labeled image of a class. The
backbone isn't fine-tuned, so that hundreds of loops take minutes. Every third training image of each data set serves
for testing, as in best_epoch.py. All rules start from the same images of a seed. The last line is JSON.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import tyro
from accuracy import auto_config, dinov2_in, unpack_cifar
from best_epoch import divide
from measure import DEVICE, PRECISION, print_result
from scipy import stats
from sklearn.cluster import KMeans, kmeans_plusplus

from utils.data.feature_dataset import FeatureDataset
from utils.data.image_list import count_earlier, list_in_memory
from utils.data.preprocessing import Preprocessing
from utils.data.transforms import EvalTransform
from utils.modeling.build import build_network
from utils.modeling.pixel_network import PixelNetwork
from utils.modeling.precision import autocast
from utils.system.thread_map import map_parallel
from utils.training.linear_probe import fit_probe

SIDES = {"trashnet": 112, "sign_digits": 70, "mnist_png": 70, "cifar10": 70}
CIFAR_IMAGES = 300
"""Training images of each class of CIFAR-10, before a third is set aside for testing."""
CANDIDATES = 10
"""Least certain images per suggested one."""


class Features(NamedTuple):
    """Features (N, C) and class ids (N,) of N images."""

    x: np.ndarray
    y: np.ndarray


@torch.inference_mode()
def embed(folder: Path, weights: Path, side: int) -> Features:
    """The features of the images in a folder of class folders, by the pretrained network."""
    paths = sorted(folder.glob("*/*"))
    classes = sorted({path.parent.name for path in paths})
    asked = auto_config(weights, side, epochs=1, seed=0, freeze_epoch=1)
    config, model, _, _ = build_network(asked.with_defaults(), classes)
    preprocessing = Preprocessing.from_config(config)
    network, transform = PixelNetwork(model.eval(), preprocessing, DEVICE), EvalTransform(preprocessing)

    def load(path: Path) -> torch.Tensor:
        with preprocessing.open(str(path)) as image:
            return transform.resize(transform.region(image))

    rows = []
    for pixels in torch.stack(list(map_parallel(load, paths, folder.name))).split(32):
        with autocast(DEVICE, PRECISION):
            rows.append(network.model.forward_embedding(network.normalize(pixels.to(DEVICE))).float().cpu())
    return Features(torch.cat(rows).numpy(), np.array([classes.index(path.parent.name) for path in paths]))


Rule = Callable[[np.ndarray, np.ndarray, int, int], np.ndarray]
"""Chooses rows (count,) by embeddings (N, C), probabilities (N, classes), count and seed."""


def margins(p: np.ndarray) -> np.ndarray:
    """Probability (N,) of the most probable class minus that of the second."""
    second, first = np.sort(p, axis=1).T[-2:]
    return first - second


def choose_random(x: np.ndarray, p: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Random images."""
    return np.random.default_rng(seed).choice(len(x), count, replace=False)


def choose_margin(x: np.ndarray, p: np.ndarray, count: int, seed: int) -> np.ndarray:
    """The least certain images."""
    return np.argsort(margins(p), kind="stable")[:count]


def choose_clusters(
    x: np.ndarray, p: np.ndarray, count: int, seed: int, weights: np.ndarray | None = None
) -> np.ndarray:
    """The image nearest to each center of k-means."""
    x = x / np.linalg.norm(x, axis=1, keepdims=True)
    distances = KMeans(count, n_init=1, random_state=seed).fit(x, sample_weight=weights).transform(x)
    chosen: list[int] = []
    for column in distances.T:
        column[chosen] = np.inf
        chosen.append(int(column.argmin()))
    return np.array(chosen)


def choose_badge(x: np.ndarray, p: np.ndarray, count: int, seed: int) -> np.ndarray:
    """BADGE (Ash et al., 2020): k-means++ on the gradients of the head, as if the predicted class were the true one."""
    gradients = p - np.eye(p.shape[1])[p.argmax(axis=1)]
    points = (gradients[:, :, None] * x[:, None, :]).reshape(len(x), -1)
    return kmeans_plusplus(points, count, random_state=seed)[1]


def of_candidates(rule: Callable[..., np.ndarray], weighted: bool = False) -> Rule:
    """A rule among the least certain images, `CANDIDATES` for each to choose."""

    def choose(x: np.ndarray, p: np.ndarray, count: int, seed: int) -> np.ndarray:
        candidates = choose_margin(x, p, CANDIDATES * count, seed)
        options = {"weights": 1 - margins(p)[candidates] + 1e-6} if weighted else {}
        return candidates[rule(x[candidates], p[candidates], count, seed, **options)]

    return choose


RULES: dict[str, Rule] = {
    "random": choose_random,
    "margin": choose_margin,
    "diversity": choose_clusters,
    "BADGE": choose_badge,
    "margin, then k-means": of_candidates(choose_clusters, weighted=True),
    "margin, then BADGE": of_candidates(choose_badge),
}


def fit_head(labeled: Features, classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Weight (classes, C) and bias (classes,) of the probe."""
    val = count_earlier(labeled.y) % 5 == 4
    parts = (
        FeatureDataset([torch.from_numpy(x)], list_in_memory((int(k), "image") for k in y), seed=0)
        for x, y in ((labeled.x[rows], labeled.y[rows]) for rows in (~val, val))
    )
    probe = fit_probe(*parts, classes, balanced=False)
    return probe.weight.numpy(), probe.bias.numpy()


def simulate(
    train: Features, test: Features, rule: Rule, seed: int, start: int, count: int, rounds: int
) -> list[float]:
    """The accuracy on `test` before and after each round."""
    random = np.random.default_rng(seed)
    classes = int(train.y.max()) + 1
    first = [random.choice(np.flatnonzero(train.y == k), start, replace=False) for k in range(classes)]
    labeled, accuracies = np.concatenate(first), []
    for number in range(rounds + 1):
        weight, bias = fit_head(Features(train.x[labeled], train.y[labeled]), classes)
        predicted = (test.x @ weight.T + bias).argmax(axis=1)
        accuracies.append(round(float((predicted == test.y).mean()), 4))
        if number < rounds:
            others = np.setdiff1d(np.arange(len(train.y)), labeled)
            p = torch.from_numpy(train.x[others] @ weight.T + bias).softmax(dim=1).numpy()
            chosen = others[rule(train.x[others], p, count, 1000 * seed + number)]
            labeled = np.append(labeled, random.permutation(chosen))
    return accuracies


def half_width(differences: np.ndarray) -> float:
    """Half the width of the 95 % interval of a mean, by Student's t."""
    n = len(differences)
    return float(stats.t.ppf(0.975, n - 1) * differences.std(ddof=1) / n**0.5)


def main(
    data: Sequence[str] = tuple(SIDES),
    seeds: int = 10,
    start: int = 10,
    count: int = 20,
    rounds: int = 5,
    shared: Path = Path("../shared"),
) -> None:
    """Compare the rules.

    Args:
        data: data sets.
        seeds: loops of each rule on each data set.
        start: images of each class that are labeled at first.
        count: images that are labeled in a round.
        rounds: rounds of a loop.
        shared: folder with `data` and `models`.
    """
    weights = dinov2_in(shared)
    top1: dict[str, dict[str, list[list[float]]]] = {}
    for name in data:
        with tempfile.TemporaryDirectory() as folder:
            source = (shared / "data" / name).resolve()
            if name == "cifar10":
                source = unpack_cifar(shared / "data/cifar10.tar", Path(folder, name), CIFAR_IMAGES)
            divided = divide(source, Path(folder, "divided"))
            train, test = (embed(divided / part, weights, SIDES[name]) for part in ("train", "test"))
        top1[name] = {}
        for rule, choose in RULES.items():
            loops = [simulate(train, test, choose, seed, start, count, rounds) for seed in range(seeds)]
            top1[name][rule] = loops
            print(f"{name:<12} {rule:<22} {describe(np.array(loops), np.array(top1[name]['random']))}", flush=True)
    for rule in RULES:
        all_loops, random = (np.mean([top1[name][r] for name in data], axis=0) for r in (rule, "random"))
        print(f"{'mean':<12} {rule:<22} {describe(all_loops, random)}")
    print_result("suggest_labels", start=start, count=count, top1=top1)


def describe(loops: np.ndarray, random: np.ndarray) -> str:
    """The mean accuracy after each round of loops (seeds, rounds + 1), and the gain over random images with its 95 %
    interval: over the mean of the rounds, and after the last."""
    means = " ".join(f"{mean:.1%}" for mean in loops.mean(axis=0))
    gains = [(loops - random)[:, 1:].mean(axis=1), (loops - random)[:, -1]]
    of_mean, of_last = (f"{100 * gain.mean():+.1f} ± {100 * half_width(gain):.1f}" for gain in gains)
    return f"{means}  gain: mean of rounds {of_mean}, last {of_last}"


if __name__ == "__main__":
    tyro.cli(main)
