"""How sure a number is: confidence intervals."""

from __future__ import annotations

import math
import warnings

import numpy as np

from utils.metrics.scores import ECE_BINS, Scores, expected_calibration_error

Interval = tuple[float, float]

NORMAL_QUANTILE = 1.959963984540054
"""Of the standard normal at 0.975, for intervals of 95 %."""
ENDS = (2.5, 97.5)
RESAMPLES, RANK_RESAMPLES = 1000, 200
MOST_RANKED = 300_000
"""Images times classes up to which resamples are ranked: it takes a second or two."""


def wilson_interval(hits: int, n: int) -> Interval:
    """Wilson's 95 % interval of the probability behind `hits` of `n`; 0 to 1 if n is 0.

    Wilson, 1927, https://doi.org/10.1080/01621459.1927.10502953.

    >>> "{:.3f} {:.3f}".format(*wilson_interval(81, 263))
    '0.255 0.366'
    """
    if n == 0:
        return 0.0, 1.0
    z2 = NORMAL_QUANTILE**2
    centre = (hits + z2 / 2) / (n + z2)
    half = NORMAL_QUANTILE * math.sqrt(hits * (n - hits) / n + z2 / 4) / (n + z2)
    return centre - half if hits else 0.0, centre + half if hits < n else 1.0


def bootstrap_intervals(scores: Scores) -> tuple[dict[str, list[float] | None], list[list[float] | None]]:
    """Percentile intervals of 95 % from resamples of the images, and those of each class's F1.

    A mean over classes is, in each resample, over those that have images in it. The two that go by rank take
    `RANK_RESAMPLES` resamples, and none (None) where images times classes are more than `MOST_RANKED`.
    Efron, 1979, https://doi.org/10.1214/aos/1176344552.
    """
    generator = np.random.default_rng(0)
    blocks, f1 = [], []
    for size in _block_sizes(RESAMPLES, len(scores)):
        figures, f1_by_class = _resampled_figures(scores, _draw(len(scores), size, generator))
        blocks.append(figures)
        f1.append(f1_by_class)
    figures = {name: np.concatenate([block[name] for block in blocks]) for name in blocks[0]}
    # Resampling adds noise to gaps that are never below 0, so all of them are too large by about as much.
    figures["ece"] = np.maximum(figures["ece"] - figures["ece"].mean() + expected_calibration_error(scores), 0)
    figures |= dict.fromkeys(("roc_auc", "average_precision"))
    if scores.probabilities.size <= MOST_RANKED:
        weights = _draw(len(scores), RANK_RESAMPLES, generator)
        figures["roc_auc"], figures["average_precision"] = resampled_rank_figures(scores, weights)
    return {name: _ends(values) for name, values in figures.items()}, [_ends(of) for of in np.concatenate(f1).T]


def _ends(values: np.ndarray | None) -> list[float] | None:
    """None too where all resamples are alike: that all are right in a few images is no proof that all ever are."""
    if values is None or np.isnan(values).all() or np.nanmin(values) == np.nanmax(values):
        return None
    return np.nanpercentile(values, ENDS).tolist()


def _block_sizes(resamples: int, n: int) -> list[int]:
    """`resamples` in parts whose weights take some 64 MB."""
    size = min(resamples, max(1, 16_000_000 // n))
    return [min(size, resamples - start) for start in range(0, resamples, size)]


def _draw(n: int, resamples: int, generator: np.random.Generator) -> np.ndarray:
    """How often each of n images comes in each resample, float32 (resamples, n)."""
    drawn = generator.integers(n, size=(resamples, n)) + n * np.arange(resamples)[:, None]
    return np.bincount(drawn.ravel(), minlength=resamples * n).reshape(resamples, n).astype(np.float32)


def _resampled_figures(scores: Scores, weights: np.ndarray) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """The figures (resamples,) of images with these weights (resamples, n), and the F1 of each class (resamples,
    classes), NaN where it has no images."""
    n = len(scores)
    support = _sum_by(scores.class_ids, weights, scores.num_classes)
    predicted = _sum_by(scores.predicted, weights, scores.num_classes)
    hits = _sum_by(scores.class_ids, weights * scores.correct.astype(np.float32), scores.num_classes)
    absent = support == 0
    precision, recall, f1 = (
        np.where(absent, np.nan, part / np.maximum(whole, 1))
        for part, whole in ((hits, predicted), (hits, support), (2 * hits, support + predicted))
    )
    gaps = _sum_by(scores.bins(), weights * (scores.confidence - scores.correct).astype(np.float32), ECE_BINS)
    macro_recall = np.nanmean(recall, axis=1)
    figures = {
        "balanced_accuracy": macro_recall,
        "macro_precision": np.nanmean(precision, axis=1),
        "macro_recall": macro_recall,
        "macro_f1": np.nanmean(f1, axis=1),
        "log_loss": weights @ scores.losses / n,
        "brier": weights @ scores.briers / n,
        "ece": np.abs(gaps).sum(axis=1) / n,
    }
    return figures, f1


def _sum_by(groups: np.ndarray, weights: np.ndarray, num_groups: int) -> np.ndarray:
    """Sums (resamples, groups) of weights (resamples, n) over the images of each group (n,)."""
    from scipy.sparse import csr_array  # slow to import

    n = len(groups)
    members = csr_array((np.ones(n, np.float32), (groups, np.arange(n))), shape=(num_groups, n))
    return (members @ weights.T).T


def resampled_rank_figures(scores: Scores, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Means over the classes of ROC-AUC and average precision, each (resamples,), for images with these weights
    (resamples, n); NaN where no class has both images and others."""
    areas = []
    for k in range(scores.num_classes):
        order = np.argsort(-scores.probabilities[:, k], kind="stable")
        score = scores.probabilities[order, k]
        # Images of equal score count at once.
        firsts = np.flatnonzero(np.r_[True, score[1:] < score[:-1]])
        positive = (scores.class_ids[order] == k).astype(np.float32)
        in_order = weights[:, order]
        hits = np.add.reduceat(in_order * positive, firsts, axis=1)  # (resamples, scores)
        falls = np.add.reduceat(in_order * (1 - positive), firsts, axis=1)
        all_hits, all_falls = hits.cumsum(axis=1), falls.cumsum(axis=1)
        p, q = all_hits[:, -1], all_falls[:, -1]
        # For each wrong image the right ones of higher score, and half of those of the same.
        pairs = (falls * (all_hits - hits / 2)).sum(axis=1)
        precision = all_hits / np.maximum(all_hits + all_falls, 1)
        both = (p > 0) & (q > 0)
        areas.append(
            [
                np.where(both, pairs / np.maximum(p * q, 1), np.nan),
                np.where(both, (hits * precision).sum(axis=1) / np.maximum(p, 1), np.nan),
            ]
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # a mean of nothing but NaN
        return tuple(np.nanmean(areas, axis=0))
