"""AUROC of scores that separate out-of-distribution (OOD) images from test images.

    python benchmarks/ood.py [--seeds 5]

Networks of trained_outputs.py, each with OOD images of another data set, or of other classes of the same one. AUROC is
the probability that an OOD image has a higher score than a test image. Intervals are 95 %, from a bootstrap over
networks of a pair and kind and, within each, over images. The last line is JSON.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from measure import print_result
from scipy.stats import rankdata
from sklearn.covariance import ledoit_wolf
from torch import Tensor
from trained_outputs import OOD_OF, Tensors, trained_outputs

from utils.inference.rejection import fit_calibration

RESAMPLES = 1000
NEIGHBOR = 10
"""k of the nearest neighbors; Sun et al. have 50 for 50,000 training images, 1,000 for 1.3 million."""
REFERENCE = "angle"
"""Thaw's."""

Score = Callable[[Tensors, Tensor, Tensor], Tensor]
"""The score (N,) of images, higher for OOD ones: of a network's outputs, and of logits (N, classes) and embeddings
(N, C)."""


def angle(tensors: Tensors, logits: Tensor, embeddings: Tensor) -> Tensor:
    """Thaw's distance: the whitened angle to the nearest class mean."""
    val = (tensors[f"val_{name}"] for name in ("logits", "embeddings", "ids"))
    return fit_calibration(*val, tensors["train_embeddings"], tensors["train_ids"]).distances(embeddings)


def energy(tensors: Tensors, logits: Tensor, embeddings: Tensor) -> Tensor:
    """Liu et al., 2020, https://arxiv.org/abs/2010.03759."""
    return -logits.logsumexp(1)


def probability(tensors: Tensors, logits: Tensor, embeddings: Tensor) -> Tensor:
    """Hendrycks and Gimpel, 2017, https://arxiv.org/abs/1610.02136."""
    return -logits.double().softmax(1).amax(1)


def mahalanobis(tensors: Tensors, logits: Tensor, embeddings: Tensor) -> Tensor:
    """Lee et al., 2018, https://arxiv.org/abs/1807.03888, on the head's input, the covariance shrunk as Thaw's."""
    x, ids = tensors["train_embeddings"].double(), tensors["train_ids"]
    present, rows = ids.unique(return_inverse=True)
    means = torch.stack([x[ids == k].mean(0) for k in present])
    precision = torch.linalg.inv(torch.from_numpy(ledoit_wolf((x - means[rows]).numpy(), assume_centered=True)[0]))
    deviations = embeddings.double()[:, None] - means  # (N, classes, C)
    return torch.einsum("nkc,cd,nkd->nk", deviations, precision, deviations).amin(1)


def neighbor(tensors: Tensors, logits: Tensor, embeddings: Tensor) -> Tensor:
    """Sun et al., 2022, https://arxiv.org/abs/2204.06507: distance to the k-th neighbor of unit length."""
    distances = torch.cdist(F.normalize(embeddings, dim=1), F.normalize(tensors["train_embeddings"], dim=1))
    return distances.sort(dim=1).values[:, NEIGHBOR - 1]


SCORES: dict[str, Score] = {
    REFERENCE: angle,
    "energy": energy,
    "probability": probability,
    "Mahalanobis": mahalanobis,
    "neighbor": neighbor,
}


def auroc(known: np.ndarray, ood: np.ndarray) -> float:
    """The probability that an OOD image has the higher score; equal ones count half."""
    ranks = rankdata(np.concatenate([known, ood]))[len(known) :]
    return float((ranks.mean() - (len(ood) + 1) / 2) / len(known))


def resampled(values: dict[str, np.ndarray], known: int, generator: np.random.Generator) -> dict[str, float]:
    """The AUROC of each score for images drawn with replacement; the first `known` values are of test images."""
    count = len(next(iter(values.values())))
    rows, ood = generator.integers(0, known, known), generator.integers(known, count, count - known)
    return {name: auroc(scores[rows], scores[ood]) for name, scores in values.items()}


def main(
    seeds: int = 5,
    tuned: int = 1,
    shared: Path = Path("../shared"),
    outputs: Path = Path("metrics_out/trained_outputs"),
) -> None:
    """Compare scores.

    Args:
        seeds: networks of each kind for each pair.
        tuned: fine-tuned networks for each pair.
        shared: folder with `data` and `models`.
        outputs: folder of the networks' outputs; those that are there aren't computed again.
    """
    generator = np.random.default_rng(0)
    plain: dict[str, list[dict[str, float]]] = {}
    bootstrap: dict[str, list[list[dict[str, float]]]] = {}
    for data, kind, tensors in trained_outputs(seeds, tuned, shared, outputs):
        name = f"{data} against {OOD_OF[data]}, {kind}"
        both = [torch.cat([tensors[f"{part}_{of}"] for part in ("test", "ood")]) for of in ("logits", "embeddings")]
        values = {score: function(tensors, *both).numpy() for score, function in SCORES.items()}
        known = len(tensors["test_ids"])
        plain.setdefault(name, []).append({score: auroc(v[:known], v[known:]) for score, v in values.items()})
        draws = [resampled(values, known, generator) for _ in range(RESAMPLES)]
        bootstrap.setdefault(name, []).append(draws)
    means: dict[str, list[np.ndarray]] = {score: [] for score in SCORES}
    for name, networks in plain.items():
        print(name)
        drawn = generator.integers(0, len(networks), (RESAMPLES, len(networks)))
        of_pair = {
            score: np.array([np.mean([bootstrap[name][n][i][score] for n in drawn[i]]) for i in range(RESAMPLES)])
            for score in SCORES
        }
        for score in SCORES:
            means[score].append(of_pair[score])
            print_score(score, np.mean([row[score] for row in networks]), of_pair[score], of_pair[REFERENCE])
    print("mean")
    for score in SCORES:
        center = np.mean([np.mean([row[score] for row in networks]) for networks in plain.values()])
        print_score(score, center, np.mean(means[score], axis=0), np.mean(means[REFERENCE], axis=0))
    print_result("ood", auroc=plain)


def print_score(score: str, center: float, values: np.ndarray, reference: np.ndarray) -> None:
    """Print an AUROC with its interval and that of the difference to `reference`, in percent."""
    low, high = 100 * np.quantile(values, (0.025, 0.975))
    least, most = 100 * np.quantile(values - reference, (0.025, 0.975))
    print(f"  {score:<14}{center:6.1%} ({low:.1f} to {high:.1f}), minus {REFERENCE} {least:+.1f} to {most:+.1f}")


if __name__ == "__main__":
    tyro.cli(main)
