"""`backbone="auto"`: measures pretrained networks on the training images and chooses one."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from nets.network import FreezableNetwork
from nets.torchvision_networks import TORCHVISION
from nets.weights.pretrained import find_pretrained
from utils.config.recipe import Choice
from utils.config.train_config import TrainConfig
from utils.data.image_list import ImageList, count_earlier, select
from utils.metrics.intervals import wilson_interval
from utils.modeling.build import BuiltNetwork, build_network
from utils.system.runtime import runtime
from utils.system.text import count_of, format_table
from utils.training.backbone_measurement import (
    FOLDS,
    TooSlow,
    check_time,
    compute_features,
    cross_validate,
    estimate_seconds,
)
from utils.training.datasets import Data
from utils.training.stages import Stage
from utils.training.summary import count_parameters

CANDIDATES = {
    "vit_xs_4": "mit",  # bundled, CIFAR-10
    "resnet18": "bsd-3-clause",  # torchvision, ImageNet
    "vit_s_14": "apache-2.0",  # DINOv2
    "vit_s_16": "apache-2.0",  # AugReg, ImageNet-21k
    "timm/convnext_tiny.fb_in22k_ft_in1k": "apache-2.0",
    "vit_b_14": "apache-2.0",  # DINOv2
    "timm/vit_base_patch14_reg1_tipsv2.webli": "apache-2.0",  # TIPSv2
    "vit_b_16": "apache-2.0",  # AugReg, ImageNet-21k
    "timm/vit_base_patch16_siglip_224.v2_webli": "apache-2.0",  # SigLIP 2
}
"""The backbones that are measured, small ones first, and the license of their weights. None forbids commercial use."""
LARGEST_SHAPE = {"vit_xs_4": 64}
"""Largest side, in pixels, of the images that a candidate is meant for."""
MAX_IMAGES = 2_000
"""Training images that are measured."""
SEARCH_MINUTES = 10.0
"""Candidates whose features wouldn't be computed by then are not measured. A download that has begun is finished."""
REMEDY = (
    "connect to the internet, set HF_ENDPOINT to a mirror, or put their weights into model_data/, see docs/weights.md"
)

Plan = tuple[TrainConfig, FreezableNetwork, list[Stage]]
"""The settings of a run, its network on the meta device, and its stages."""


class Measured(NamedTuple):
    """A candidate's result.

    Attributes:
        backbone: its name.
        hits: number of images whose class was predicted by a regression on others.
        images: number of images.
        images_per_second: of the pass that computes features.
        parameters: number of parameters.
        minutes: estimated time of the run's training.
    """

    backbone: str
    hits: int
    images: int
    images_per_second: float
    parameters: int
    minutes: float

    @property
    def accuracy(self) -> float:
        """Cross-validated accuracy."""
        return self.hits / self.images

    @property
    def standard_error(self) -> float:
        """Of the accuracy."""
        return math.sqrt(self.accuracy * (1 - self.accuracy) / self.images)


def choose_backbone(asked: TrainConfig, data: Data, device: torch.device, plan: Callable[[str], Plan]) -> Choice:
    """Measure the candidates on one rank, print the results, and return the choice.

    Args:
        asked: the settings, with `backbone="auto"`.
        data: the lists.
        device: where the networks run.
        plan: plans the run with a backbone; raises a ValueError if it can't be trained with the settings.

    Raises:
        ValueError: there are too few images, no candidate can be measured, or none trains within `backbone_minutes`.
    """
    images = sample_images(data.train_images, asked.seed)
    classes = count_of(len(np.unique(images.class_ids)), "class")
    print(
        f"backbone  measuring pretrained networks on {count_of(len(images), 'training image')} of {classes}, for up to "
        f"{SEARCH_MINUTES:g} minutes"
    )
    deadline = time.monotonic() + 60 * SEARCH_MINUTES
    measured, skipped, missing, unreachable = [], [], [], set()
    for name in CANDIDATES:
        try:
            if max(asked.input_shape) > LARGEST_SHAPE.get(name, math.inf):
                raise ValueError(f"it is for images of up to {LARGEST_SHAPE[name]} pixels")
            planned = plan(name)
            check_time(0, deadline)
            candidate = load_candidate(planned, find_weights_file(name, unreachable), data.class_names)
        except FileNotFoundError:
            missing.append(name)
        except (TooSlow, ValueError) as error:
            skipped.append(f"  {name} not measured: {error}")
        else:  # errors of images are not the candidate's
            try:
                measured.append(measure(planned, candidate, data, images, device, deadline))
            except TooSlow as error:
                skipped.append(f"  {name} not measured: {error}")
            except torch.OutOfMemoryError:
                skipped.append(f"  {name} not measured: it doesn't fit into the memory of the device")
    if missing:
        skipped.append(f"  not at hand, and not downloaded: {', '.join(missing)}; {REMEDY}")
    print("\n".join([*([format_measured(measured)] if measured else []), *skipped]))
    return select_backbone(measured, asked.backbone_minutes)


def sample_images(images: ImageList, seed: int) -> ImageList:
    """Up to `MAX_IMAGES`, as evenly as possible of up to a fifth as many classes, with two images or more each.

    Raises:
        ValueError: fewer than two classes have two images.
    """
    generator = np.random.default_rng(seed)
    classes = np.flatnonzero(np.bincount(images.class_ids) > 1)
    if len(classes) < 2:
        raise ValueError(
            "backbone='auto': the training list must have two images of at least two classes; name a backbone"
        )
    classes = generator.permutation(classes)[: MAX_IMAGES // FOLDS]
    order = generator.permutation(np.flatnonzero(np.isin(images.class_ids, classes)))
    order = order[np.argsort(count_earlier(images.class_ids[order]), kind="stable")]
    return select(images, np.sort(order[:MAX_IMAGES]))


def find_weights_file(name: str, unreachable: set[bool]) -> Path:
    """The file with the weights of a candidate, downloaded if it isn't at hand.

    Args:
        name: of the candidate.
        unreachable: the servers that didn't answer (True: torchvision's, False: the hub), which aren't asked again;
            updated.

    Raises:
        FileNotFoundError: it is not at hand and can't be downloaded.
        ValueError: it is damaged.
    """
    is_torchvision = name in TORCHVISION
    try:
        return find_pretrained(name, online=False).path
    except FileNotFoundError:
        if is_torchvision in unreachable:
            raise
    try:
        return find_pretrained(name).path
    except FileNotFoundError:
        unreachable.add(is_torchvision)
        raise


def load_candidate(planned: Plan, weights: Path, class_names: list[str]) -> BuiltNetwork:
    """The network of `planned` with a file of weights, and the settings with the preprocessing that they expect.

    Raises:
        ValueError: the weights can't be used.
    """
    with redirect_stdout(None):  # about the weights of the one that is chosen, the run prints the same
        return build_network(replace(planned[0], pretrained=str(weights)), class_names)


def measure(
    planned: Plan, candidate: BuiltNetwork, data: Data, images: ImageList, device: torch.device, deadline: float
) -> Measured:
    """Measure the network of `planned`, with its weights, on `images`.

    Raises:
        TooSlow: its features wouldn't be computed by the `deadline` of `time.monotonic`.
        ImageError: no image of a class can be read.
    """
    config, network, stages = planned
    candidate.model.resize(config.input_shape)  # it was built for the first stage
    features = compute_features(candidate.model, candidate.config, images, device, deadline)
    hits = cross_validate(features.values, images.class_ids, config.seed)
    counts = len(data.train_images), len(data.val_images)
    minutes = estimate_seconds(config, network, stages, counts, features) / runtime.world_size / 60
    speed = 1 / features.seconds
    return Measured(config.backbone, int(hits.sum()), len(hits), speed, count_parameters(network), minutes)


def select_backbone(measured: Sequence[Measured], max_minutes: float) -> Choice:
    """The candidate that trains fastest among those within one standard error of the highest accuracy.

    Args:
        measured: the candidates.
        max_minutes: those that train for longer are excluded; 0: none.

    Raises:
        ValueError: there is none, or none that is fast enough.
    """
    if not measured:
        raise ValueError(
            f"backbone='auto': no candidate could be measured, as listed above; {REMEDY}, or name a backbone"
        )
    in_time = [each for each in measured if not max_minutes or each.minutes <= max_minutes]
    if not in_time:
        fastest = min(measured, key=lambda each: each.minutes)
        raise ValueError(
            f"backbone_minutes={max_minutes:g}: {fastest.backbone}, the fastest, takes about {fastest.minutes:.1f}; "
            f"raise it, or set fewer epochs, a smaller input_shape or freeze_blocks to all"
        )
    best = max(in_time, key=lambda each: each.accuracy)
    close = [each for each in in_time if each.accuracy >= best.accuracy - best.standard_error]
    chosen = min(close, key=lambda each: each.minutes)
    why = "the highest"
    if chosen is not best:
        why = f"within one standard error of {best.accuracy:.1%} of {best.backbone}, and faster"
    limit = f" in {max_minutes:g} minutes" if len(in_time) < len(measured) else ""
    return Choice("backbone", chosen.backbone, f"accuracy {chosen.accuracy:.1%}, {why}{limit}", by="measurement")


def format_measured(measured: Sequence[Measured]) -> str:
    """The table of the candidates, the most accurate first."""
    header = ("backbone", "accuracy", "95 % interval", "images/s", "M parameters", "license", "minutes of training")
    rows = [header]
    for each in sorted(measured, key=lambda each: -each.accuracy):
        low, high = wilson_interval(each.hits, each.images)
        rows.append(
            (
                each.backbone,
                f"{each.accuracy:.1%}",
                f"{low:.1%} to {high:.1%}",
                f"{each.images_per_second:.1f}",
                f"{each.parameters / 1e6:.1f}",
                CANDIDATES[each.backbone],
                f"{each.minutes:.1f}",
            )
        )
    return format_table(rows, right=(header[1], *header[3:5], header[6]))
