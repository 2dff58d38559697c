"""Trials for the recipe on small sets: one change of the settings at a time, and averages of weights.

    python benchmarks/recipe_trials.py [--results FILE]

Sets are cut from the training images of trashnet, sign_digits and cifar10; other training images test. To try what the
program can't do, such as leaving out tokens, networks are trained here in a plain loop, from the same probe and with
the same schedule as `train.py`. Three kinds of weights are tested: the last ones, the mean of the second half of a run
("mean of weights"), and the mean of the first and the last (WiSE-FT: Wortsman et al., 2022,
https://arxiv.org/abs/2109.01903), each with its own head and with one that is fitted once more (`refit_head`). Finished
runs are kept in `--results`.
"""

from __future__ import annotations

import io
import json
import random
import statistics
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from accuracy import dinov2_in
from measure import DEVICE, PRECISION, print_result
from PIL import Image
from time_to_accuracy import MEAN, STD
from torch import Tensor, nn
from torchvision.transforms import v2

from nets.network import FreezableNetwork, Part
from utils.config.train_config import TrainConfig
from utils.modeling.build import build_network
from utils.modeling.precision import autocast
from utils.system.files import write_text
from utils.training.linear_probe import fit_probe, refit_head
from utils.training.optimizer import learning_rate_at, parameter_groups

SIDES = {"trashnet": 112, "sign_digits": 70, "cifar10": 70}
STORED_SIDE = {"trashnet": 160, "sign_digits": 100, "cifar10": 32}
"""Short side of the decoded images that crops are taken from."""
CUTS = ((2, 20), (10, 5), (10, 20))
"""Classes, at most, and images of each, a tenth of which (at least one) validates."""
CIFAR_TRAIN, CIFAR_TEST = 220, 60
MAX_TEST = {2: 60, 10: 30}
"""Test images of each class, by number of classes."""
SNAPSHOTS = 8
EVAL_CROP = 0.875

State = dict[str, Tensor]
Labelled = list[tuple[Tensor, int]]
"""Images, (3, height, width) uint8, and class ids."""


@dataclass(frozen=True)
class Trial:
    """Settings of a run.

    Attributes:
        samples: training samples, over all epochs.
        rate: `init_lr`.
        batch: images per step.
        smoothing: `label_smoothing`.
        crop: `train_crop`.
        layer_decay: as in the config.
        warm_up: steps over which the learning rate rises at first, instead of a twentieth of the run.
        frozen: number of first blocks that are frozen with the embeddings; -1: nothing is.
        tokens: share of the patch tokens that a block sees in training (PatchDropout: Liu et al., 2022,
            https://arxiv.org/abs/2208.07220).
        lora: rank of the updates of linear layers, instead of all weights (Hu et al., 2021,
            https://arxiv.org/abs/2106.09685); 0: all weights.
        probe: whether the head starts as a regression.
        with_val: whether the validation images are trained on, too.
    """

    samples: int = 1600
    rate: float = 4e-3
    batch: int = 16
    smoothing: float = 0.0
    crop: float = 0.3
    layer_decay: float = 0.7
    warm_up: int = 0
    frozen: int = -1
    tokens: float = 1.0
    lora: int = 0
    probe: bool = True
    with_val: bool = False


SMOOTHED = Trial(smoothing=0.1)
TRIALS: dict[str, Trial] = {
    "few samples, as five epochs of 60 images": Trial(samples=300),
    "1,600 samples": Trial(),
    "4,800 samples": Trial(samples=4800),
    "init_lr 0.001": Trial(rate=1e-3),
    "half of the tokens, 3,200 samples": Trial(samples=3200, tokens=0.5),
    "validation images are trained on": Trial(with_val=True),
    "label_smoothing 0.1": SMOOTHED,
    "label_smoothing 0.2": Trial(smoothing=0.2),
    "smoothed, init_lr 0.002": replace(SMOOTHED, rate=2e-3),
    "smoothed, validation images are trained on": replace(SMOOTHED, with_val=True),
    "smoothed, six blocks frozen": replace(SMOOTHED, frozen=6),
    "smoothed, random head": replace(SMOOTHED, probe=False),
    "smoothed, train_crop 0.6": replace(SMOOTHED, crop=0.6),
    "smoothed, layer_decay 0.85": replace(SMOOTHED, layer_decay=0.85),
    "smoothed, 20 steps of warm-up": replace(SMOOTHED, warm_up=20),
    "smoothed, batch size 8": replace(SMOOTHED, batch=8),
    "smoothed, LoRA of rank 8, init_lr 0.016": replace(SMOOTHED, lora=8, rate=0.016, layer_decay=1.0),
}


class Cut(NamedTuple):
    """A small set."""

    classes: int
    side: int
    train: Labelled
    val: Labelled
    test: Labelled


def read_images(shared: Path) -> dict[str, list[tuple[list[Tensor], list[Tensor]]]]:
    """For each data set and class the images to train on and to test with, decoded."""
    sets = {}
    for name in ("trashnet", "sign_digits"):
        folders = sorted((shared / "data" / name / "train").iterdir())
        classes = [[decode(file, STORED_SIDE[name]) for file in sorted(folder.iterdir())] for folder in folders]
        sets[name] = [([x for i, x in enumerate(xs) if i % 3 != 2], xs[2::3]) for xs in classes]
    with tarfile.open(shared / "data/cifar10.tar") as archive:
        by_class: dict[str, list[str]] = {}
        for name in sorted(archive.getnames()):
            if name.endswith(".jpg") and Path(name).parts[-3] == "train":
                by_class.setdefault(Path(name).parts[-2], []).append(name)
        sets["cifar10"] = []
        for names in by_class.values():
            files = (archive.extractfile(name).read() for name in names[: CIFAR_TRAIN + CIFAR_TEST])
            images = [decode(io.BytesIO(file), STORED_SIDE["cifar10"]) for file in files]
            sets["cifar10"].append((images[:CIFAR_TRAIN], images[CIFAR_TRAIN:]))
    return sets


def decode(file: Path | io.BytesIO, side: int) -> Tensor:
    """The image, its short side shrunk to `side` if it is longer."""
    image = Image.open(file).convert("RGB")
    scale = side / min(image.size)
    if scale < 1:
        image = image.resize((round(image.width * scale), round(image.height * scale)), Image.BICUBIC, reducing_gap=3)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def make_cut(sets: dict[str, Any], name: str, classes: int, count: int, seed: int) -> Cut:
    """Draw classes, and images of each."""
    generator = random.Random(f"{name} {classes} {count} {seed}")
    chosen = sorted(generator.sample(range(len(sets[name])), min(classes, len(sets[name]))))
    cut = Cut(len(chosen), SIDES[name], [], [], [])
    for class_id, index in enumerate(chosen):
        images, test = sets[name][index]
        drawn = [images[i] for i in generator.sample(range(len(images)), min(count, len(images)))]
        num_val = max(1, round(0.1 * len(drawn)))
        cut.val.extend((image, class_id) for image in drawn[:num_val])
        cut.train.extend((image, class_id) for image in drawn[num_val:])
        cut.test.extend((image, class_id) for image in test[: MAX_TEST[classes]])
    return cut


def normalize(images: Tensor) -> Tensor:
    """Images (B, 3, height, width) uint8 as the network expects them."""
    return v2.functional.normalize(images.float() / 255, MEAN, STD)


def as_in_evaluation(images: Labelled, side: int) -> tuple[Tensor, Tensor]:
    """The center crops (N, 3, side, side), and class ids (N,)."""
    size = round(side / EVAL_CROP)
    crop = v2.Compose([v2.Resize(size, v2.InterpolationMode.BICUBIC, antialias=True), v2.CenterCrop(side)])
    return normalize(torch.stack([crop(image) for image, _ in images])), torch.tensor([k for _, k in images])


@torch.inference_mode()
def embed(model: FreezableNetwork, images: Tensor) -> np.ndarray:
    """The input of the head, (N, C)."""
    model.eval()
    with autocast(DEVICE, PRECISION):
        return torch.cat([model.forward_embedding(part.to(DEVICE)).float().cpu() for part in images.split(32)]).numpy()


def build(weights: Path, side: int, classes: int) -> FreezableNetwork:
    """DINOv2's ViT-S/14."""
    config = TrainConfig(
        backbone="vit_s_14",
        model_path=str(weights),
        activation="gelu",
        input_shape=(side, side),
        **dict.fromkeys(("drop_rate", "attn_drop_rate", "drop_path_rate"), 0.0),
    ).with_defaults()
    return build_network(config, [str(k) for k in range(classes)]).model.to(DEVICE)


class LowRank(nn.Module):
    """A frozen linear layer with a trained update of low rank."""

    def __init__(self, linear: nn.Linear, rank: int) -> None:
        super().__init__()
        self.linear = linear.requires_grad_(False)
        self.down = nn.Parameter(torch.randn(rank, linear.in_features) / linear.in_features**0.5)
        self.up = nn.Parameter(torch.zeros(linear.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + 2 * (x @ self.down.T @ self.up.T)


def add_low_rank(model: FreezableNetwork, rank: int) -> None:
    """Train only updates of low rank, and the head."""
    model.requires_grad_(False)
    model.head.requires_grad_(True)
    for block in model.blocks:
        block.attn.qkv, block.attn.proj = LowRank(block.attn.qkv, rank), LowRank(block.attn.proj, rank)
        block.mlp.fc1, block.mlp.fc2 = LowRank(block.mlp.fc1, rank), LowRank(block.mlp.fc2, rank)


def drop_tokens(model: FreezableNetwork, share: float) -> None:
    """In training, blocks see a random share of the patch tokens, and the class token."""
    first, *rest = model.parts()

    def forward(x: Tensor) -> Tensor:
        x = first.forward(x)  # (B, N, C)
        if not model.training:
            return x
        kept = 1 + torch.rand(len(x), x.shape[1] - 1).argsort(1)[:, : round(share * (x.shape[1] - 1))]
        kept = torch.cat([torch.zeros(len(x), 1, dtype=torch.long), kept], dim=1).to(x.device)
        return x.gather(1, kept[:, :, None].expand(-1, -1, x.shape[2]))

    parts = [Part(forward, first.owned), *rest]
    model.parts = lambda: parts


def train(model: FreezableNetwork, images: Labelled, side: int, trial: Trial, seed: int) -> Iterator[State]:
    """Train, and yield the weights at `SNAPSHOTS` steps, the last of which is the end."""
    generator = random.Random(seed)
    torch.manual_seed(seed)
    augment = v2.Compose(
        [
            v2.RandomResizedCrop(side, (trial.crop, 1.0), interpolation=v2.InterpolationMode.BICUBIC, antialias=True),
            v2.RandomHorizontalFlip(),
        ]
    )
    batch = min(trial.batch, len(images))
    steps = round(trial.samples / batch)
    peak = trial.rate * batch / 256
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.05, trial.layer_decay), peak)
    due = [max(1, round(steps * (i + 1) / SNAPSHOTS)) for i in range(SNAPSHOTS)]
    order: list[int] = []
    model.train()
    for step in range(steps):
        if len(order) < batch:
            order = generator.sample(range(len(images)), len(images))
        rows = [images[order.pop()] for _ in range(batch)]
        pixels = normalize(torch.stack([augment(image) for image, _ in rows])).to(DEVICE)
        rate = learning_rate_at(step / steps, 1, peak, peak / 100, "cos") * min(1, (step + 1) / max(1, trial.warm_up))
        for group in optimizer.param_groups:
            group["lr"] = rate * group["lr_scale"]
        with autocast(DEVICE, PRECISION):
            logits = model(pixels)
        targets = torch.tensor([k for _, k in rows], device=DEVICE)
        F.cross_entropy(logits.float(), targets, label_smoothing=trial.smoothing).backward()
        optimizer.step()
        optimizer.zero_grad()
        for _ in range(due.count(step + 1)):
            yield copy_state(model)


def copy_state(model: nn.Module) -> State:
    """The weights of a network, copied."""
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def mean_state(states: Sequence[State]) -> State:
    """The mean of the weights."""
    return {name: sum(state[name] for state in states) / len(states) for name in states[0]}


def run(cut: Cut, weights: Path, trial: Trial, seed: int) -> dict[str, float]:
    """Test accuracy of the probe, and after training of each kind of weights with its own and with a new head."""
    model = build(weights, cut.side, cut.classes)
    (x, y), (val_x, val_y), (test_x, test_y) = (
        as_in_evaluation(images, cut.side) for images in (cut.train, cut.val, cut.test)
    )
    probe = fit_probe(embed(model, x), y.numpy(), embed(model, val_x), val_y.numpy(), cut.classes, balanced=False)

    def accuracy(features: np.ndarray, weight: Tensor, bias: Tensor) -> float:
        return ((torch.from_numpy(features) @ weight.T + bias).argmax(1) == test_y).float().mean().item()

    scores = {"probe": accuracy(embed(model, test_x), probe.weight, probe.bias)}
    if trial.probe:
        with torch.no_grad():
            model.head.weight.copy_(probe.weight)
            model.head.bias.copy_(probe.bias)
    if trial.frozen >= 0:
        model.freeze_backbone(trial.frozen)
    if trial.lora:
        add_low_rank(model, trial.lora)
    if trial.tokens < 1:
        drop_tokens(model, trial.tokens)
    first = copy_state(model)
    images = cut.train + cut.val if trial.with_val else cut.train
    states = list(train(model, images, cut.side, trial, seed))
    late = mean_state(states[SNAPSHOTS // 2 :])
    kinds = {"last": states[-1], "mean of weights": late, "WiSE-FT": mean_state([first, states[-1]])}
    for kind, state in kinds.items():
        model.load_state_dict(state)
        features, head = embed(model, test_x), (state["head.weight"].cpu(), state["head.bias"].cpu())
        scores[kind] = accuracy(features, *head)
        arrays = (embed(model, x), y.numpy(), embed(model, val_x), val_y.numpy())
        if not trial.with_val:
            refit = refit_head(*arrays, cut.classes, balanced=False)
            scores[f"{kind}, new head"] = accuracy(features, refit.weight, refit.bias)
    return scores


def main(
    trials: tuple[str, ...] = tuple(TRIALS),
    seeds: int = 1,
    shared: Path = Path("../shared"),
    results: Path = Path("benchmarks/recipe_trials.json"),
) -> None:
    """Compare trials.

    Args:
        trials: any of `TRIALS`.
        seeds: cuts of each size of each data set.
        shared: folder with `data` and `models`.
        results: file of finished runs.
    """
    weights, sets = dinov2_in(shared), read_images(shared)
    finished: dict[str, dict[str, float]] = json.loads(results.read_text()) if results.is_file() else {}
    rows: dict[str, list[dict[str, float]]] = {}
    for trial, seed, (classes, count), name in product(trials, range(seeds), CUTS, SIDES):
        key = f"{name}, {classes} classes, {count} images each, {seed}: {json.dumps(asdict(TRIALS[trial]))}"
        if key not in finished:
            finished[key] = run(make_cut(sets, name, classes, count, seed), weights, TRIALS[trial], seed)
            write_text(results, json.dumps(finished, indent=1))
        rows.setdefault(trial, []).append(finished[key])
        print(f"{trial}: {key.partition(':')[0]}: {finished[key]['last']:.1%}", flush=True)
    for trial, scores in rows.items():
        means = {kind: statistics.mean(each[kind] for each in scores) for kind in scores[0]}
        print(f"{trial}: " + ", ".join(f"{kind} {mean:.1%}" for kind, mean in means.items()))
    print_result("recipe_trials", top1=rows)


if __name__ == "__main__":
    tyro.cli(main)
