"""Comparison of two classifiers on the same images: is the difference significant?"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from utils.evaluation.eval_lists import Overlap
from utils.metrics.intervals import NORMAL_QUANTILE, Interval
from utils.metrics.scores import Scores
from utils.system.text import printable

MAX_PRINTED = 5
"""Images printed per classifier; `flipped.csv` has all."""
SIGNIFICANCE_LEVEL = 0.05


def mcnemar_p_value(only_a: int, only_b: int) -> float:
    """The p-value of McNemar's exact two-sided test (McNemar, 1947, https://doi.org/10.1007/BF02295996).

    Null hypothesis: an image that only one of the two classifies correctly is as likely to be A's as B's.
    """
    from scipy.stats import binomtest  # slow to import

    return binomtest(only_b, only_a + only_b).pvalue if only_a + only_b else 1.0


def difference_interval(only_a: int, only_b: int, n: int) -> Interval:
    """The 95 % confidence interval of the difference in accuracy, B - A, on n images.

    The Wald interval with 0.5 added to each of the four cells, which makes it valid for few images
    (Agresti and Min, 2005, https://doi.org/10.1002/sim.1781).
    """
    a, b, n = only_a + 0.5, only_b + 0.5, n + 2
    center = (b - a) / n
    half = NORMAL_QUANTILE * math.sqrt(a + b - (b - a) ** 2 / n) / n
    return max(-1.0, center - half), min(1.0, center + half)


def compare(a: Scores, b: Scores, overlaps: tuple[Overlap, Overlap]) -> dict[str, Any]:
    """The content of `comparison.json`, for two classifiers on the same images and the overlap of each with its run."""
    n = len(a)
    only_a, only_b = int((a.correct & ~b.correct).sum()), int((b.correct & ~a.correct).sum())
    return {
        "images": n,
        "top1": [float(a.correct.mean()), float(b.correct.mean())],
        "difference": (only_b - only_a) / n,
        "interval": list(difference_interval(only_a, only_b, n)),
        "p_value": mcnemar_p_value(only_a, only_b),
        "only_a_right": only_a,
        "only_b_right": only_b,
        "both_right": int((a.correct & b.correct).sum()),
        "both_wrong": int((~a.correct & ~b.correct).sum()),
        "trained_on": [overlap.trained_on for overlap in overlaps],
        "validated_on": [overlap.validated_on for overlap in overlaps],
        "known": [overlap.known for overlap in overlaps],
        "notes": [f"{name}: {note}" for name, overlap in zip("AB", overlaps, strict=True) for note in overlap.notes],
    }


def format_comparison(comparison: dict[str, Any]) -> str:
    """The comparison as printed: figures, conclusion, warnings."""
    (top1_a, top1_b), (low, high) = comparison["top1"], comparison["interval"]
    p = comparison["p_value"]
    lines = [
        f"top-1 of A {top1_a:.2%}, of B {top1_b:.2%}, on the same {comparison['images']} images",
        f"correct: only A {comparison['only_a_right']}, only B {comparison['only_b_right']}, both "
        f"{comparison['both_right']}, neither {comparison['both_wrong']}",
        f"B - A: {100 * comparison['difference']:+.2f} points, 95% interval {100 * low:+.2f} to {100 * high:+.2f}; "
        f"McNemar's p = {p:.2g}",
    ]
    better, other = (1, 0) if comparison["difference"] > 0 else (0, 1)
    columns = zip(comparison["trained_on"], comparison["validated_on"], comparison["known"], strict=True)
    seen = [trained_on + validated_on if known else math.inf for trained_on, validated_on, known in columns]
    if p >= SIGNIFICANCE_LEVEL:
        lines.append("the difference is not significant: these images do not show which one is better")
    elif seen[better] > seen[other]:
        lines.append(f"no conclusion: {'AB'[better]} is more accurate, but has, or may have, seen more of these images")
    else:
        lines.append(f"{'AB'[better]} is significantly better on these images")
    return "\n".join([*lines, *(f"warning: {note}" for note in comparison["notes"])])


def flipped_rows(a: Scores, b: Scores, paths: list[str], class_names: list[str]) -> list[list[str]]:
    """The rows of `flipped.csv`: the header, then images that only one classifies correctly, most confident first."""
    flipped = np.flatnonzero(a.correct != b.correct)
    confidence = np.where(a.correct, a.confidence, b.confidence)[flipped]
    rows = [["path", "truth", "right", "prediction_a", "probability_a", "prediction_b", "probability_b"]]
    for i in flipped[np.argsort(-confidence, kind="stable")].tolist():
        predictions = [cell for s in (a, b) for cell in (class_names[s.predicted[i]], f"{s.confidence[i]:.6f}")]
        rows.append([paths[i], class_names[a.class_ids[i]], "A" if a.correct[i] else "B", *predictions])
    return rows


def format_flipped(rows: list[list[str]]) -> str:
    """The first images that only A, then those that only B classifies correctly, one per line."""
    lines = []
    for side, other in (("A", 5), ("B", 3)):
        of_side = [row for row in rows[1:] if row[2] == side]
        if of_side:
            first = f" (first {MAX_PRINTED} of {len(of_side)})" if len(of_side) > MAX_PRINTED else ""
            lines.append(f"only {side} is correct{first}:")
        for row in of_side[:MAX_PRINTED]:
            lines.append(printable(f"  {row[0]}: {row[1]}, not {row[other]} ({float(row[other + 1]):.0%})"))
    return "\n".join(lines)
