"""The head's best beginning: logistic regression on the features of the backbone."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn
from tqdm import tqdm

from utils.config.train_config import TrainConfig
from utils.data.dataset import ImageDataset
from utils.data.feature_dataset import FeatureDataset
from utils.training.feature_cache import FeatureCache

INVERSE_PENALTIES = 10.0 ** np.arange(-5, 1.5, 0.5)
"""The values of C that are tried, scikit-learn's inverse strength of the penalty, from strong to weak."""


class Probe(NamedTuple):
    """A fitted head.

    Attributes:
        weight: (classes, C).
        bias: (classes,).
        inverse_penalty: which of `INVERSE_PENALTIES` was the best.
        val_loss: cross-entropy on the validation features, in nats.
        val_top1: part of the validation features whose class it names, 0 to 1.
    """

    weight: Tensor
    bias: Tensor
    inverse_penalty: float
    val_loss: float
    val_top1: float


def init_head(
    model: nn.Module, cache: FeatureCache, train_set: ImageDataset, val_set: ImageDataset, config: TrainConfig
) -> None:
    """Give the head of `model` the weights of the logistic regression on its backbone's features, out of `cache`: of
    the images as in evaluation."""
    known = np.unique(train_set.class_ids)
    if len(known) < 2 or not np.isin(val_set.class_ids, known).any():
        raise ValueError(
            "head_init='probe': the training list must have images of two classes, and the validation list some of "
            "them too; set it to random"
        )
    model.freeze_backbone("all")
    features = cache.open(train_set, config.train_annotation_path, 1)
    val_features = cache.open(val_set, config.val_annotation_path, 1)
    model.unfreeze_backbone()
    balanced = "balanced" in (config.sampler, config.class_weights)
    probe = fit_probe(features, val_features, model.head.out_features, balanced)
    with torch.no_grad():
        model.head.weight.copy_(probe.weight)
        model.head.bias.copy_(probe.bias)
    print(
        f"head_init: logistic regression, C={probe.inverse_penalty:.1g}: validation loss {probe.val_loss:.3f}, "
        f"top-1 {probe.val_top1:.1%}"
    )


def fit_probe(features: FeatureDataset, val_features: FeatureDataset, num_classes: int, balanced: bool) -> Probe:
    """The logistic regression on `features`, each (C,), whose penalty gives the lowest loss on `val_features`.

    It is fitted to features of mean 0 and deviation 1, which the penalty is meant for, and taken back to features as
    they are. A class without images gets the lowest logit that any other has for the images of `features`.

    Args:
        features: to fit to, in any number of views.
        val_features: to choose by; classes that aren't in `features` don't count there.
        num_classes: outputs of the head.
        balanced: every class counts alike, however many images it has.
    """
    x, y = _arrays(features)
    val_x, val_y = _arrays(val_features)
    scaler = StandardScaler().fit(x)
    x, val_x = scaler.transform(x), scaler.transform(val_x)
    known = np.isin(val_y, y)
    regression = LogisticRegression(max_iter=1000, warm_start=True, class_weight="balanced" if balanced else None)
    best = None
    for inverse_penalty in tqdm(INVERSE_PENALTIES, desc="probe", unit="fit", leave=False, disable=None):
        regression.set_params(C=inverse_penalty).fit(x, y)
        loss = log_loss(val_y[known], regression.predict_proba(val_x[known]), labels=regression.classes_)
        if best is None or loss < best.val_loss:
            weight, bias = _unscaled(regression, scaler, x, num_classes)
            top1 = float((regression.predict(val_x) == val_y).mean())
            best = Probe(weight, bias, float(inverse_penalty), float(loss), top1)
    return best


def _arrays(dataset: FeatureDataset) -> tuple[np.ndarray, np.ndarray]:
    """All views one after the other: features (views · n, C) and class ids (views · n,)."""
    return torch.cat(dataset.views).float().numpy(), dataset.targets.repeat(len(dataset.views)).numpy()


def _unscaled(
    regression: LogisticRegression, scaler: StandardScaler, x: np.ndarray, num_classes: int
) -> tuple[Tensor, Tensor]:
    """Weight (classes, C) and bias (classes,) that give for plain features what `regression` gives for scaled ones, x
    (n, C)."""
    coefficients, intercepts = regression.coef_, regression.intercept_
    if len(regression.classes_) == 2:  # scikit-learn has one row then, which is for the second class
        coefficients, intercepts = np.concatenate([-coefficients, coefficients]) / 2, np.r_[-intercepts, intercepts] / 2
    lowest = (x @ coefficients.T + intercepts).min()
    coefficients = coefficients / scaler.scale_
    intercepts = intercepts - coefficients @ scaler.mean_
    weight, bias = np.zeros((num_classes, coefficients.shape[1])), np.full(num_classes, lowest)
    weight[regression.classes_], bias[regression.classes_] = coefficients, intercepts
    return torch.from_numpy(weight).float(), torch.from_numpy(bias).float()
