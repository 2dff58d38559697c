"""Find images unlike their class, and labels that are likely wrong, by embeddings from a pretrained backbone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator

import numpy as np
from tqdm import tqdm

from utils.annotation.audit import Finding
from utils.annotation.audited_images import AuditedImage
from utils.annotation.embeddings import embed_images
from utils.config.train_config import TrainConfig
from utils.metrics.label_errors import find_label_errors
from utils.system.text import count_of

NEIGHBORS = 10
"""Neighbors whose mean distance is compared. A few images of one kind, such as five screenshots, stay far from most."""
MIN_DISTANCE_RATIO = 1.4
"""Mean distance to the neighbors of an outlier, as a multiple of the median of its class. Chosen on TrashNet for the
best F1, see `benchmarks/deep_audit.py`."""
MAX_LABEL_PROBABILITY = 0.05
"""Highest probability of a label that is reported as likely wrong, chosen on TrashNet, too."""
INVERSE_PENALTIES = (0.001, 0.01, 0.1, 1.0)
"""Values of C to choose from, scikit-learn's inverse strength of the penalty, for standardized embeddings."""
FOLDS = 5
ROWS = 1024
"""Images whose distances to their class are in memory at a time."""


def audit_embeddings(images: Iterable[AuditedImage], config: TrainConfig) -> list[Finding]:
    """Return outliers and likely wrong labels among the images, except unreadable and blank ones, found otherwise.

    Args:
        images: of all splits.
        config: from `utils.annotation.embeddings.choose_backbone`.
    """
    images = [image for image in images if not (image.fingerprint.error or image.fingerprint.flat)]
    if not images:
        return []
    embeddings = embed_images(images, config)
    class_names, class_ids = np.unique([image.class_name for image in images], return_inverse=True)
    findings = []
    if outliers := find_outliers(embeddings.middle, class_ids):
        message = (
            f"{count_of(len(outliers), 'image')} unlike the others of the class, the most unlike first: perhaps "
            f"a placeholder, a screenshot, a logo, or a rare view; look at them"
        )
        findings.append(Finding("outlier", message, [[images[i]] for i in outliers]))
    if wrong := list(find_wrong_labels(embeddings.both, class_ids)):
        likely_classes = {images[i].path: str(class_names[likely]) for i, likely in wrong}
        pairs = Counter((images[i].class_name, likely_classes[images[i].path]) for i, _ in wrong).most_common(3)
        details = ", ".join(f"{count} x {given} that may be {likely}" for (given, likely), count in pairs)
        message = f"the label of {count_of(len(wrong), 'image')} is likely wrong, the most likely first: {details}"
        groups = [[images[i]] for i, _ in wrong]
        findings.append(Finding("likely wrong label", message, groups, likely_classes=likely_classes))
    return findings


def distance_ratios(embeddings: np.ndarray, class_ids: np.ndarray) -> np.ndarray:
    """Return the mean distance (N,) of each image to its nearest neighbors in its class, over the class's median.

    1 for all images of a class with `NEIGHBORS` images or fewer, which is too small to compare.

    Args:
        embeddings: (N, C).
        class_ids: (N,).
    """
    ratios = np.ones(len(embeddings))
    for class_id in np.unique(class_ids):
        members = np.flatnonzero(class_ids == class_id)
        if len(members) > NEIGHBORS:
            distances = _neighbor_distances(embeddings[members].astype(np.float64))
            ratios[members] = distances / max(np.median(distances), 1e-12)
    return ratios


def _neighbor_distances(points: np.ndarray) -> np.ndarray:
    """Return for each of points (n, C) the mean Euclidean distance to its nearest neighbors but itself."""
    squares = (points**2).sum(axis=1)
    means = []
    for start in range(0, len(points), ROWS):
        rows = slice(start, start + ROWS)
        squared = squares[rows, None] + squares - 2 * points[rows] @ points.T
        squared[np.arange(len(squared)), start + np.arange(len(squared))] = np.inf  # the image itself
        nearest = np.partition(squared, NEIGHBORS - 1, axis=1)[:, :NEIGHBORS]
        means.append(np.sqrt(np.maximum(nearest, 0)).mean(axis=1))
    return np.concatenate(means)


def find_outliers(embeddings: np.ndarray, class_ids: np.ndarray) -> list[int]:
    """Return the indices of images unlike all others of their class, the most unlike first.

    Args:
        embeddings: (N, C), of the middle of a network: its last layers know objects, but not that an image is text.
        class_ids: (N,).
    """
    ratios = distance_ratios(embeddings, class_ids)
    order = np.argsort(-ratios, kind="stable")
    return order[ratios[order] >= MIN_DISTANCE_RATIO].tolist()


def find_wrong_labels(embeddings: np.ndarray, class_ids: np.ndarray) -> Iterator[tuple[int, int]]:
    """Yield the index and the likely class id of each image whose label is likely wrong, the most likely first.

    Confident learning on the probabilities of logistic regressions, each of which hasn't seen the images that it
    predicts. Classes with fewer than `FOLDS` images are excluded.

    Args:
        embeddings: (N, C).
        class_ids: (N,).
    """
    known, counts = np.unique(class_ids, return_counts=True)
    known = known[counts >= FOLDS]
    if len(known) < 2:
        return
    members = np.flatnonzero(np.isin(class_ids, known))
    labels = np.searchsorted(known, class_ids[members])
    probabilities = _cross_validated(embeddings[members], labels)
    for i in find_label_errors(labels, probabilities):
        if probabilities[i, labels[i]] < MAX_LABEL_PROBABILITY:
            yield int(members[i]), int(known[probabilities[i].argmax()])


def _cross_validated(embeddings: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return probabilities (N, classes), with the penalty of the lowest loss."""
    from sklearn.linear_model import LogisticRegression  # slow to import
    from sklearn.metrics import log_loss
    from sklearn.model_selection import StratifiedKFold, cross_val_predict
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    folds = StratifiedKFold(FOLDS, shuffle=True, random_state=0)  # near-duplicates often have neighboring names
    results = []
    for inverse_penalty in tqdm(INVERSE_PENALTIES, "probe", unit="fit", leave=False, disable=None):
        probe = make_pipeline(StandardScaler(), LogisticRegression(C=inverse_penalty, max_iter=1000))
        results.append(cross_val_predict(probe, embeddings, labels, cv=folds, method="predict_proba"))
    return min(results, key=lambda probabilities: log_loss(labels, probabilities))
