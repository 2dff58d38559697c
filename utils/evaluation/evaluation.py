"""A checkpoint held against a list: everything that there is to report."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor
from tqdm import tqdm

from utils.data.dataset import FileSource, ImageDataset
from utils.data.image_list import ImageList, sample_indices, select
from utils.data.loader import eval_loader, fetch
from utils.evaluation.corruptions import CORRUPTIONS, corrupt
from utils.evaluation.eval_lists import count_seen
from utils.inference.classifier import Classifier
from utils.inference.outputs import Outputs
from utils.metrics.classification import evaluation_metrics
from utils.metrics.intervals import wilson_interval
from utils.metrics.scores import Scores, expected_calibration_error


@dataclass(frozen=True)
class Evaluation:
    """What there is to report of a checkpoint on a list.

    Attributes:
        checkpoint: the file.
        checkpoint_sha256: of the file as it was opened; a run that is going on may have put another in its place.
        data: what it was evaluated on, a list or a folder.
        classifier: what the file holds.
        images: the images.
        outputs: of the network for them.
        corrupted: corruption -> right answers and images, of a part of them; "none": of the same as they are.
        ood: outputs for images that are of no class; None: there are none.
        max_error: the part of the accepted answers that may be wrong, where the report speaks of rejection.
    """

    checkpoint: Path
    checkpoint_sha256: str
    data: str
    classifier: Classifier
    images: ImageList
    outputs: Outputs
    corrupted: Mapping[str, tuple[int, int]]
    ood: Outputs | None
    max_error: float

    @cached_property
    def scores(self) -> Scores:
        """By the probabilities that the classifier gives."""
        return Scores.of(self.outputs.logits, self.outputs.class_ids, self.classifier.temperature)

    @cached_property
    def raw_scores(self) -> Scores:
        """By those of the network."""
        return Scores.of(self.outputs.logits, self.outputs.class_ids)

    @cached_property
    def metrics(self) -> dict[str, Any]:
        """What `metrics.json` holds."""
        raw = self.raw_scores
        figures = evaluation_metrics(self.scores, self.classifier.class_names)
        return {
            "checkpoint": str(self.checkpoint),
            "checkpoint_sha256": self.checkpoint_sha256,
            "data": self.data,
            "notes": self._notes(figures["absent_classes"]),
            "temperature": self.classifier.temperature,
            **figures,
            "raw": {
                "log_loss": float(raw.losses.mean()),
                "brier": float(raw.briers.mean()),
                "ece": expected_calibration_error(raw),
            },
            "rejection": self.rejection(self.max_error) if self.classifier.can_reject else None,
            "corruptions": {name: hits / n for name, (hits, n) in self.corrupted.items()},
        }

    def _notes(self, absent_classes: list[str]) -> list[str]:
        """What a reader of the figures should know first."""
        notes = count_seen(self.checkpoint, self.classifier, self.images).notes
        if absent_classes:
            notes.append(f"No images, so not in the means: {', '.join(absent_classes)}")
        classifier = self.classifier
        if classifier.calibration is None and classifier.temperature != 1:
            notes.append(
                "Exported weights: the temperature fitted after training is in them, thresholds to reject by are not"
            )
        elif classifier.calibration is None:
            notes.append(
                "Not calibrated: only the best checkpoint of a finished run is. Probabilities are the network's own"
            )
        elif classifier.raw:
            notes.append("Probabilities are the network's own, as asked for: the fitted temperature isn't used")
        return notes

    def rejection(self, max_error: float) -> dict[str, float | int | list[float] | None]:
        """What becomes of these images, and of the strangers, if validation allows the part `max_error` of errors
        among the accepted."""
        rejection = self.classifier.calibration.choose_rejection(max_error)
        accepted = rejection.accepts(*self.judged).numpy()
        n, count, wrong = len(accepted), int(accepted.sum()), int((accepted & ~self.scores.correct).sum())
        row: dict[str, Any] = {
            "max_error": max_error,
            "least_probability": None if math.isinf(rejection.least_probability) else rejection.least_probability,
            "farthest": rejection.farthest,
            "accepted": count / n,
            "error": wrong / count if count else None,
            "error_interval": list(wilson_interval(wrong, count)),
        }
        if self.ood is not None:
            row["ood"] = len(self.ood.logits)
            row["ood_rejected"] = 1 - rejection.accepts(*self.judged_ood).numpy().mean()
        return row

    @cached_property
    def judged(self) -> tuple[Tensor, Tensor]:
        """Of each image the probability of its likeliest class and its distance from all, by which it is rejected."""
        return self._judge(self.outputs)

    @cached_property
    def judged_ood(self) -> tuple[Tensor, Tensor]:
        """The same of the strangers."""
        return self._judge(self.ood)

    def _judge(self, outputs: Outputs) -> tuple[Tensor, Tensor]:
        probability = (outputs.logits / self.classifier.temperature).softmax(dim=1).amax(dim=1)
        return probability, self.classifier.calibration.distances(outputs.embeddings)


def evaluate_corrupted(
    classifier: Classifier, images: ImageList, outputs: Outputs, most: int, num_workers: int, batch_size: int
) -> dict[str, tuple[int, int]]:
    """Right answers and images under each corruption of up to `most` images drawn at random, and under "none" of
    the same as they are, which `outputs` has."""
    if most == 0:
        return {}
    drawn = sample_indices(images, most, seed=0)
    as_they_are = (outputs.logits[drawn].argmax(dim=1) == outputs.class_ids[drawn]).sum()
    hits = {"none": int(as_they_are)} | dict.fromkeys(CORRUPTIONS, 0)
    source = FileSource(select(images, drawn), classifier.preprocessing)
    loader = eval_loader(ImageDataset(source, classifier.transform, seed=0), batch_size, num_workers)
    bar = tqdm(fetch(loader), "corrupting", len(loader), unit="batch", leave=False, disable=None)
    for number, (pixels, class_ids) in enumerate(bar):
        for name, corruption in CORRUPTIONS.items():
            _, logits = classifier.forward(corrupt(pixels, corruption, number))
            hits[name] += int((logits.argmax(dim=1) == class_ids).sum())
    return {name: (count, len(drawn)) for name, count in hits.items()}
