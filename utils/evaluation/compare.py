"""Whether one classifier is really better than another: both on the same images."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from utils.evaluation.eval_lists import Seen
from utils.metrics.intervals import NORMAL_QUANTILE, Interval
from utils.metrics.scores import Scores
from utils.system.text import printable

NAMED = 5
"""Images of each kind that the terminal names."""
LEVEL = 0.05


def mcnemar_p_value(only_a: int, only_b: int) -> float:
    """How likely chance alone makes the numbers of images that only A, and only B, names right differ so much.

    McNemar's test in its exact, two-sided form: if neither is better, each such image falls to either side like a
    coin. McNemar, 1947, https://doi.org/10.1007/BF02295996.
    """
    from scipy.stats import binomtest  # slow to import

    return binomtest(only_b, only_a + only_b).pvalue if only_a + only_b else 1.0


def difference_interval(only_a: int, only_b: int, n: int) -> Interval:
    """The 95 % interval of the difference in accuracy, B less A, of n images that both named.

    Agresti and Min, 2005, https://doi.org/10.1002/sim.1781: Wald's, with half an image added to each of the four
    cells, so that it holds for few images too.
    """
    a, b, n = only_a + 0.5, only_b + 0.5, n + 2
    centre = (b - a) / n
    half = NORMAL_QUANTILE * math.sqrt(a + b - (b - a) ** 2 / n) / n
    return max(-1.0, centre - half), min(1.0, centre + half)


def compare(a: Scores, b: Scores, seen: tuple[Seen, Seen]) -> dict[str, Any]:
    """What `comparison.json` holds: of two classifiers on the same images, and what their runs have seen of them."""
    only_a, only_b = (int(np.count_nonzero(x & ~y)) for x, y in ((a.correct, b.correct), (b.correct, a.correct)))
    n = len(a)
    return {
        "images": n,
        "top1": [float(a.correct.mean()), float(b.correct.mean())],
        "difference": (only_b - only_a) / n,
        "interval": list(difference_interval(only_a, only_b, n)),
        "p_value": mcnemar_p_value(only_a, only_b),
        "only_a_right": only_a,
        "only_b_right": only_b,
        "both_right": int(np.count_nonzero(a.correct & b.correct)),
        "both_wrong": int(np.count_nonzero(~a.correct & ~b.correct)),
        "trained_on": [of_run.trained_on for of_run in seen],
        "validated_on": [of_run.validated_on for of_run in seen],
        "known": [of_run.known for of_run in seen],
        "notes": [f"{name}: {note}" for name, of_run in zip("AB", seen, strict=True) for note in of_run.notes],
    }


def format_comparison(comparison: dict[str, Any]) -> str:
    """The comparison in words, then what may be concluded and what to know of it."""
    (top1_a, top1_b), (low, high) = comparison["top1"], comparison["interval"]
    p, n = comparison["p_value"], comparison["images"]
    lines = [
        f"A: top-1 {top1_a:.2%}; B: top-1 {top1_b:.2%}; the same {n} images",
        f"only A is right: {comparison['only_a_right']}; only B: {comparison['only_b_right']}; both: "
        f"{comparison['both_right']}; neither: {comparison['both_wrong']}",
        f"B less A: {100 * comparison['difference']:+.2f} points, 95 % interval {100 * low:+.2f} to {100 * high:+.2f}; "
        f"McNemar's p = {p:.2g}",
    ]
    better, other = (1, 0) if comparison["difference"] > 0 else (0, 1)
    seen = [
        trained_on + validated_on if known else math.inf
        for trained_on, validated_on, known in zip(
            comparison["trained_on"], comparison["validated_on"], comparison["known"], strict=True
        )
    ]
    if p < LEVEL and seen[better] > seen[other]:
        lines.append(f"{'AB'[better]} has seen more of these images, or may have, so that it needn't be better")
    elif p < LEVEL:
        lines.append(f"{'AB'[better]} is better, on images like these")
    else:
        lines.append("such a difference may well be chance: these images don't tell which is better")
    return "\n".join([*lines, *(f"warning: {note}" for note in comparison["notes"])])


def flipped_rows(a: Scores, b: Scores, paths: list[str], class_names: list[str]) -> list[list[str]]:
    """The header, then a row for each image that exactly one names right, the surest such answer first."""
    flipped = np.flatnonzero(a.correct != b.correct)
    surest = np.where(a.correct, a.confidence, b.confidence)[flipped]
    rows = [["path", "truth", "right", "prediction_a", "probability_a", "prediction_b", "probability_b"]]
    for i in flipped[np.argsort(-surest, kind="stable")].tolist():
        told = [cell for s in (a, b) for cell in (class_names[s.predicted[i]], f"{s.confidence[i]:.6f}")]
        rows.append([paths[i], class_names[a.class_ids[i]], "A" if a.correct[i] else "B", *told])
    return rows


def format_flipped(rows: list[list[str]]) -> str:
    """The first images that only A, and only B, names right, a line each."""
    lines = []
    for side, other in (("A", 5), ("B", 3)):
        of_side = [row for row in rows[1:] if row[2] == side]
        if of_side:
            lines.append(f"only {side} is right{f', the first {NAMED}' if len(of_side) > NAMED else ''}:")
        for row in of_side[:NAMED]:
            lines.append(printable(f"  {row[0]}: {row[1]}, not {row[other]} ({float(row[other + 1]):.0%})"))
    return "\n".join(lines)
