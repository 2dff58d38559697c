"""Fits the head by logistic regression to the features of the backbone: before training, and once more after it."""

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
from utils.system.runtime import runtime
from utils.training.feature_cache import FeatureCache

INVERSE_PENALTIES = 10.0 ** np.arange(-5, 1.5, 0.5)
"""Values of C to choose from, scikit-learn's inverse strength of the penalty."""


class Probe(NamedTuple):
    """A fitted head.

    Attributes:
        weight: (classes, C).
        bias: (classes,).
        inverse_penalty: the best of `INVERSE_PENALTIES`.
        val_loss: cross-entropy on the validation features.
        val_top1: accuracy on the validation features.
    """

    weight: Tensor
    bias: Tensor
    inverse_penalty: float
    val_loss: float
    val_top1: float

    def predict(self, features: Tensor) -> Tensor:
        """Logits (n, classes) of features (n, C)."""
        return features @ self.weight.T + self.bias


def init_head(
    model: nn.Module, cache: FeatureCache, train_set: ImageDataset, val_set: ImageDataset, config: TrainConfig
) -> None:
    """Set the head of `model` to logistic regression on the features, from `cache`, of the images as in evaluation.

    Raises:
        ValueError: the training list has only one class, or the validation list has none of its classes.
    """
    known = np.unique(train_set.class_ids)
    if len(known) < 2 or not np.isin(val_set.class_ids, known).any():
        raise ValueError(
            "head_init='probe': the training list must have images of at least two classes, and the validation list "
            "images of these; set head_init to random"
        )
    model.freeze_backbone("all")
    features = cache.open(train_set, config.train_annotation_path, 1)
    val_features = cache.open(val_set, config.val_annotation_path, 1)
    model.unfreeze_backbone()
    balanced = "balanced" in (config.sampler, config.class_weights)
    arrays = (*_arrays(features), *_arrays(val_features))
    probe = runtime.first(lambda: fit_probe(*arrays, model.head.out_features, balanced))
    with torch.no_grad():
        model.head.weight.copy_(probe.weight)
        model.head.bias.copy_(probe.bias)
    print(
        f"head_init: logistic regression, C={probe.inverse_penalty:.1g}: validation loss {probe.val_loss:.3f}, "
        f"top-1 {probe.val_top1:.1%}"
    )


def fit_probe(
    x: np.ndarray, y: np.ndarray, val_x: np.ndarray, val_y: np.ndarray, num_classes: int, balanced: bool
) -> Probe:
    """Fit logistic regressions to features `x` and return the one with the lowest loss on `val_x`.

    Features are standardized for the fit, since the penalty depends on their scale; the result is for unscaled ones.
    The logit of a class without training images is the lowest that any class has for a training image.

    Args:
        x: training features, (n, C).
        y: their class ids, (n,).
        val_x: validation features, (m, C).
        val_y: their class ids, (m,); classes that aren't in `y` are excluded from the loss.
        num_classes: outputs of the head.
        balanced: weight classes equally.
    """
    scaler = StandardScaler().fit(x)
    x, val_x = scaler.transform(x), scaler.transform(val_x)
    known = np.isin(val_y, y)
    regression = make_regression(balanced)
    best = None
    for inverse_penalty in tqdm(INVERSE_PENALTIES, desc="probe", unit="fit", leave=False, disable=None):
        regression.set_params(C=inverse_penalty).fit(x, y)
        loss = log_loss(val_y[known], regression.predict_proba(val_x[known]), labels=regression.classes_)
        if best is None or loss < best.val_loss:
            weight, bias = _unscale(regression, scaler, x, num_classes)
            top1 = float((regression.predict(val_x) == val_y).mean())
            best = Probe(weight, bias, float(inverse_penalty), float(loss), top1)
    return best


class Refit(NamedTuple):
    """A head fitted once more.

    Attributes:
        weight: (classes, C), fitted to training and validation features.
        bias: (classes,).
        probe: the head that was fitted to the training features alone, with the same penalty.
    """

    weight: Tensor
    bias: Tensor
    probe: Probe


def refit_head(
    x: np.ndarray, y: np.ndarray, val_x: np.ndarray, val_y: np.ndarray, num_classes: int, balanced: bool
) -> Refit:
    """Fit a logistic regression to training and validation features together, with the penalty that `fit_probe` chooses
    on the latter; for the arguments see there."""
    probe = fit_probe(x, y, val_x, val_y, num_classes, balanced)
    all_x, all_y = np.concatenate([x, val_x]), np.concatenate([y, val_y])
    scaler = StandardScaler().fit(all_x)
    scaled = scaler.transform(all_x)
    regression = make_regression(balanced).set_params(C=probe.inverse_penalty).fit(scaled, all_y)
    return Refit(*_unscale(regression, scaler, scaled, num_classes), probe)


def make_regression(balanced: bool) -> LogisticRegression:
    """An unfitted logistic regression; `balanced`: weight classes equally."""
    return LogisticRegression(max_iter=1000, warm_start=True, class_weight="balanced" if balanced else None)


def _arrays(dataset: FeatureDataset) -> tuple[np.ndarray, np.ndarray]:
    """Features (views * N, C) and class ids (views * N,) of all views."""
    return torch.cat(dataset.views).float().numpy(), dataset.targets.repeat(len(dataset.views)).numpy()


def _unscale(
    regression: LogisticRegression, scaler: StandardScaler, x: np.ndarray, num_classes: int
) -> tuple[Tensor, Tensor]:
    """Weight (classes, C) and bias (classes,) for unscaled features. x: the scaled training features, (N, C)."""
    coefficients, intercepts = regression.coef_, regression.intercept_
    if len(regression.classes_) == 2:  # scikit-learn only has a row for the second class
        coefficients, intercepts = np.concatenate([-coefficients, coefficients]) / 2, np.r_[-intercepts, intercepts] / 2
    lowest = (x @ coefficients.T + intercepts).min()
    coefficients = coefficients / scaler.scale_
    intercepts = intercepts - coefficients @ scaler.mean_
    weight, bias = np.zeros((num_classes, coefficients.shape[1])), np.full(num_classes, lowest)
    weight[regression.classes_], bias[regression.classes_] = coefficients, intercepts
    return torch.from_numpy(weight).float(), torch.from_numpy(bias).float()
