"""Measures a pretrained network on images of a run: accuracy of its features, speed, and time of training."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Sequence
from itertools import islice
from typing import NamedTuple

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from sklearn.model_selection import StratifiedKFold
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from nets.network import FreezableNetwork
from utils.config.train_config import TrainConfig
from utils.data.dataset import FileSource, ImageDataset
from utils.data.image_list import ImageList
from utils.data.preprocessing import Preprocessing
from utils.data.transforms import EvalTransform
from utils.modeling.pixel_network import PixelNetwork
from utils.modeling.precision import autocast, choose_precision
from utils.system.thread_map import map_parallel
from utils.training.feature_cache import MAX_BATCH
from utils.training.stages import Stage, num_cached_views

INVERSE_PENALTIES = 10.0 ** np.arange(-4, 1)
"""Values of C to choose from, scikit-learn's inverse strength of the penalty."""
FOLDS = 5


class TooSlow(Exception):
    """A candidate doesn't fit into the time of the search."""


class Features(NamedTuple):
    """What a network computes for n images, and how fast.

    Attributes:
        values: (n, C), the input of the head.
        seconds: per image, with loading it.
        forward_seconds: per image, without.
    """

    values: np.ndarray
    seconds: float
    forward_seconds: float


def compute_features(
    model: FreezableNetwork, config: TrainConfig, images: ImageList, device: torch.device, deadline: float
) -> Features:
    """The features of images as in evaluation. Unreadable images are replaced by others of their class.

    Raises:
        TooSlow: it wouldn't be done by the `deadline` of `time.monotonic`.
        ImageError: no image of a class can be read.
    """
    preprocessing = Preprocessing.from_config(config)
    network = PixelNetwork(model.eval(), preprocessing, device)
    precision, _ = choose_precision(config.precision, device)
    dataset = ImageDataset(FileSource(images, preprocessing), EvalTransform(preprocessing), config.seed, 1.0)

    def forward(pixels: Tensor) -> Tensor:
        with torch.inference_mode(), autocast(device, precision):
            return model.forward_embedding(network.normalize(pixels.to(device))).float().cpu()

    forward(torch.zeros(MAX_BATCH, 3, *config.input_shape, dtype=torch.uint8))  # the first batch takes longer
    pixels = map_parallel(lambda i: dataset[0, i, 0][0], range(len(images)), config.backbone)
    features: list[Tensor] = []
    done, in_network, started = 0, 0.0, time.monotonic()
    while batch := list(islice(pixels, MAX_BATCH)):
        loaded = time.monotonic()
        features.append(forward(torch.stack(batch)))
        now = time.monotonic()
        done, in_network = done + len(batch), in_network + now - loaded
        seconds = (now - started) / done
        check_time(seconds * (len(images) - done), deadline)
    return Features(torch.cat(features).numpy(), seconds, in_network / done)


def check_time(seconds: float, deadline: float) -> None:
    """Raise TooSlow unless there are `seconds` before the `deadline` of `time.monotonic`."""
    if time.monotonic() + seconds > deadline:
        raise TooSlow("it doesn't fit into the time of the search")


def cross_validate(x: np.ndarray, class_ids: np.ndarray, seed: int) -> np.ndarray:
    """Whether the class of each image, (n,) bool, is predicted by logistic regression on the images of other folds.

    The penalty with the lowest loss over all folds is used.

    Args:
        x: features (n, C).
        class_ids: (n,), each two times or more.
        seed: determines the folds.
    """
    classes, y = np.unique(class_ids, return_inverse=True)
    probabilities = np.zeros((len(INVERSE_PENALTIES), len(y), len(classes)), np.float32)
    splitter = StratifiedKFold(min(FOLDS, np.bincount(y).max()), shuffle=True, random_state=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of classes with few images
        for train, test in splitter.split(x, y):
            scaler = StandardScaler().fit(x[train])
            regression = LogisticRegression(max_iter=1000, warm_start=True)
            for i, inverse_penalty in enumerate(INVERSE_PENALTIES):
                regression.set_params(C=inverse_penalty).fit(scaler.transform(x[train]), y[train])
                probabilities[i, test] = regression.predict_proba(scaler.transform(x[test]))
    losses = [log_loss(y, each, labels=np.arange(len(classes))) for each in probabilities]
    return probabilities[np.argmin(losses)].argmax(axis=1) == y


def estimate_seconds(
    config: TrainConfig, network: FreezableNetwork, stages: Sequence[Stage], counts: tuple[int, int], features: Features
) -> float:
    """Estimate the time of a run on one rank.

    Backward counts as two forward passes, and the trained part of the network by its share of the parameters.

    Args:
        config: the settings.
        network: on the meta device; freezing changes it.
        stages: of the run.
        counts: training and validation images.
        features: of the network at the input shape of `config`.
    """
    train, val = counts
    load, forward = features.seconds, features.forward_seconds
    total = (train + val) * load if config.head_init == "probe" else 0.0
    seen = train * config.epoch_repeats  # in each epoch
    for stage in stages:
        stage.frozen.apply(network)
        parameters = list(network.parameters())
        trained = sum(p.numel() for p in parameters if p.requires_grad) / sum(p.numel() for p in parameters)
        epochs, views = stage.end - stage.start, num_cached_views(stage, config)
        if views:
            seconds = (views * train + val) * load + epochs * (3 * seen + val) * trained * forward
        else:
            seconds = epochs * (seen * max(load, (1 + 2 * trained) * forward) + val * load)
        total += seconds * math.prod(stage.input_shape) / math.prod(config.input_shape)
    return total
