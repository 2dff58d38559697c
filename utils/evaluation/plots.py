"""The plot of the confusion matrix."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from utils.system.fonts import font_families, warn_about_glyphs
from utils.system.text import printable

if TYPE_CHECKING:
    from scipy.sparse import csr_array

matplotlib.rcParams["font.family"] = font_families()

MAX_CLASSES = 40
"""Maximum number of classes in a confusion matrix; more would not be readable."""


def arrange_classes(confusion: csr_array) -> np.ndarray:
    """The class ids to show of a confusion matrix (classes, classes), ordered so that confused classes are adjacent.

    At most `MAX_CLASSES`, those with the most mistakes.
    """
    from scipy.cluster.hierarchy import leaves_list, linkage  # slow to import
    from scipy.spatial.distance import squareform

    mistakes = _mistakes(confusion)
    by_mistakes = np.argsort(-(mistakes.sum(axis=0) + mistakes.sum(axis=1)), kind="stable")
    shown = np.sort(by_mistakes[:MAX_CLASSES])
    if not _is_rearranged(confusion):
        return shown
    fraction = fractions(confusion, shown)
    np.fill_diagonal(fraction, 0)
    closeness = fraction + fraction.T
    distance = squareform(1 - closeness / max(closeness.max(), 1e-9), checks=False)
    return shown[leaves_list(linkage(distance, "average", optimal_ordering=True))]


def fractions(confusion: csr_array, shown: np.ndarray) -> np.ndarray:
    """Counts between the classes `shown` as fractions of all images of the true class."""
    return select(confusion, shown) / np.maximum(confusion.sum(axis=1)[shown, None], 1)


def select(confusion: csr_array, shown: np.ndarray) -> np.ndarray:
    """Counts between the classes `shown`."""
    return confusion[shown][:, shown].toarray()


def describe_order(confusion: csr_array) -> str:
    """Why `arrange_classes` returns the classes in this order."""
    if _is_rearranged(confusion):
        return "ordered so that classes that are often confused are next to each other"
    return "in the order of the class file"


def _is_rearranged(confusion: csr_array) -> bool:
    return confusion.shape[0] > 2 and bool(_mistakes(confusion).sum())


def _mistakes(confusion: csr_array) -> csr_array:
    from scipy.sparse import diags_array  # slow to import

    return confusion - diags_array(confusion.diagonal(), dtype=confusion.dtype)


def plot_confusion(confusion: csr_array, class_names: Sequence[str]) -> Figure:
    """Plot the classes of a confusion matrix (classes, classes) that `arrange_classes` selects, with their counts."""
    shown = arrange_classes(confusion)
    n = len(shown)
    side = max(4.5, 1.8 + 0.35 * n)
    figure = Figure(figsize=(side, side * 0.92), layout="constrained")
    axes = figure.subplots()
    counts, fraction = select(confusion, shown), fractions(confusion, shown)
    image = axes.imshow(fraction, cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(image, ax=axes, shrink=0.8, label="fraction of the true class")
    subset = f": the {n} of {len(class_names)} classes with the most mistakes" if n < len(class_names) else ""
    axes.set(xlabel="predicted", ylabel="true")
    axes.set_title(f"confusion matrix{subset}\n{describe_order(confusion)}", fontsize=9)
    names = _labels([class_names[k] for k in shown])
    warn_about_glyphs(names)
    axes.set_xticks(range(n), names, rotation=90)
    axes.set_yticks(range(n), names)
    for row, column in zip(*np.nonzero(counts), strict=True):
        color = "white" if fraction[row, column] > 0.5 else "black"
        size = 8 if counts[row, column] < 1000 else 6
        axes.text(column, row, counts[row, column], ha="center", va="center", color=color, fontsize=size)
    return figure


def _labels(class_names: Sequence[str]) -> list[str]:
    """Class names shortened, with $ escaped: matplotlib would read it as a formula."""
    short = [name if len(name) <= 24 else f"{name[:23]}…" for name in class_names]
    return [printable(name).replace("$", r"\$") for name in short]
