"""95 % confidence intervals of metrics."""

from __future__ import annotations

import warnings

import numpy as np

from utils.metrics.scores import ECE_BINS, Scores, expected_calibration_error

Interval = tuple[float, float]

NORMAL_QUANTILE = 1.959963984540054
"""The 0.975 quantile of the standard normal distribution, for intervals of 95 %."""
PERCENTILES = (2.5, 97.5)
RESAMPLES, RANK_RESAMPLES = 1000, 200
MAX_RANKED = 300_000
"""Rank metrics are resampled up to this number of images times classes, which takes a second or two."""


def wilson_interval(hits: int, n: int) -> Interval:
    """Wilson's interval of the probability behind `hits` of `n`; 0 to 1 if n is 0.

    >>> "{:.3f} {:.3f}".format(*wilson_interval(81, 263))
    '0.255 0.366'
    """
    from scipy.stats import binomtest  # slow to import

    if n == 0:
        return 0.0, 1.0
    interval = binomtest(hits, n).proportion_ci(confidence_level=0.95, method="wilson")
    return float(interval.low), float(interval.high)


def bootstrap_intervals(scores: Scores) -> tuple[dict[str, list[float] | None], list[list[float] | None]]:
    """Bootstrap percentile intervals of the metrics, and of the F1 of each class.

    Efron, 1979, https://doi.org/10.1214/aos/1176344552. In each resample, means over classes exclude classes without
    images. The rank metrics (ROC-AUC, average precision) use `RANK_RESAMPLES` resamples, and are None above
    `MAX_RANKED`.
    """
    generator = np.random.default_rng(0)
    blocks, f1 = [], []
    block_size = min(RESAMPLES, max(1, 16_000_000 // len(scores)))  # weights of about 64 MB
    for start in range(0, RESAMPLES, block_size):
        weights = _draw(len(scores), min(block_size, RESAMPLES - start), generator)
        block, block_f1 = _resampled_metrics(scores, weights)
        blocks.append(block)
        f1.append(block_f1)
    metrics = {name: np.concatenate([block[name] for block in blocks]) for name in blocks[0]}
    # Resampling noise increases the absolute gaps, and so the ECE of every resample, by about the same amount.
    metrics["ece"] = np.maximum(metrics["ece"] - metrics["ece"].mean() + expected_calibration_error(scores), 0)
    metrics |= dict.fromkeys(("roc_auc", "average_precision"))
    if len(scores) * scores.num_classes <= MAX_RANKED:
        weights = _draw(len(scores), RANK_RESAMPLES, generator)
        metrics["roc_auc"], metrics["average_precision"] = resampled_rank_metrics(scores, weights)
    f1_intervals: list[list[float] | None] = [None] * scores.num_classes
    for k, values in zip(scores.present, np.concatenate(f1).T, strict=True):
        f1_intervals[k] = _interval(values)
    return {name: _interval(values) for name, values in metrics.items()}, f1_intervals


def _interval(values: np.ndarray | None) -> list[float] | None:
    """The percentile interval of resampled values.

    None also if all values are equal, as when all of a few images are correct: the interval would have no width.
    """
    if values is None or np.isnan(values).all() or np.nanmin(values) == np.nanmax(values):
        return None
    return np.nanpercentile(values, PERCENTILES).tolist()


def _draw(n: int, resamples: int, generator: np.random.Generator) -> np.ndarray:
    """How often each of n images is drawn in each resample, float32 (resamples, n)."""
    drawn = generator.integers(n, size=(resamples, n)) + n * np.arange(resamples)[:, None]
    return np.bincount(drawn.ravel(), minlength=resamples * n).reshape(resamples, n).astype(np.float32)


def _resampled_metrics(scores: Scores, weights: np.ndarray) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Metrics (resamples,) of images with these weights (resamples, n), and the F1 of each class that has images
    (resamples, such classes).

    F1 is NaN for a class without images in the resample.
    """
    n, present = len(scores), scores.present
    num_present = len(present)
    class_ids = np.searchsorted(present, scores.class_ids)  # among the classes that have images: often far fewer
    is_present = scores.support[scores.predicted] > 0
    predicted_ids = np.searchsorted(present, scores.predicted[is_present])
    support = _sum_by(class_ids, weights, num_present)
    predicted = _sum_by(predicted_ids, weights[:, is_present], num_present)
    hits = _sum_by(class_ids, weights * scores.correct.astype(np.float32), num_present)
    absent = support == 0
    precision, recall, f1 = (
        np.where(absent, np.nan, numerator / np.maximum(denominator, 1))
        for numerator, denominator in ((hits, predicted), (hits, support), (2 * hits, support + predicted))
    )
    gaps = _sum_by(scores.bins(), weights * (scores.confidence - scores.correct).astype(np.float32), ECE_BINS)
    macro_recall = np.nanmean(recall, axis=1)
    metrics = {
        "balanced_accuracy": macro_recall,
        "macro_precision": np.nanmean(precision, axis=1),
        "macro_recall": macro_recall,
        "macro_f1": np.nanmean(f1, axis=1),
        "log_loss": weights @ scores.losses / n,
        "brier": weights @ scores.briers / n,
        "ece": np.abs(gaps).sum(axis=1) / n,
    }
    return metrics, f1


def _sum_by(groups: np.ndarray, weights: np.ndarray, num_groups: int) -> np.ndarray:
    """Sums (resamples, groups) of the weights (resamples, n) of the images in each group; `groups` is (n,)."""
    from scipy.sparse import csr_array  # slow to import

    n = len(groups)
    members = csr_array((np.ones(n, np.float32), (groups, np.arange(n))), shape=(num_groups, n))
    return (members @ weights.T).T


def resampled_rank_metrics(scores: Scores, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """ROC-AUC and average precision, each (resamples,), of images with these weights (resamples, n).

    Both are one-vs-rest means over the classes; a class counts if it has both positive and negative images, and the
    mean is NaN if none does.
    """
    areas = []
    for k, probabilities in zip(scores.present, scores.present_probabilities.T, strict=True):
        order = np.argsort(-probabilities, kind="stable")
        score = probabilities[order]
        starts = np.flatnonzero(np.r_[True, score[1:] < score[:-1]])  # images of equal score form one group
        positive = (scores.class_ids[order] == k).astype(np.float32)
        sorted_weights = weights[:, order]
        positives = np.add.reduceat(sorted_weights * positive, starts, axis=1)  # (resamples, groups)
        negatives = np.add.reduceat(sorted_weights * (1 - positive), starts, axis=1)
        positives_above, negatives_above = positives.cumsum(axis=1), negatives.cumsum(axis=1)  # own group included
        p, q = positives_above[:, -1], negatives_above[:, -1]
        # ROC-AUC is the fraction of pairs whose positive has the higher score; ties count half.
        pairs = (negatives * (positives_above - positives / 2)).sum(axis=1)
        precision = positives_above / np.maximum(positives_above + negatives_above, 1)
        valid = (p > 0) & (q > 0)
        roc_auc = np.where(valid, pairs / np.maximum(p * q, 1), np.nan)
        average_precision = np.where(valid, (positives * precision).sum(axis=1) / np.maximum(p, 1), np.nan)
        areas.append([roc_auc, average_precision])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # the mean of NaN only
        return tuple(np.nanmean(areas, axis=0))
