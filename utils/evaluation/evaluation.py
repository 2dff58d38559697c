"""The evaluation of a checkpoint on a list: everything that the report shows."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from utils.data.dataset import FileSource, ImageDataset
from utils.data.image_list import ImageList, sample_indices, select
from utils.data.loader import eval_loader, iterate_batches
from utils.evaluation.corruptions import CORRUPTIONS, corrupt
from utils.evaluation.eval_lists import count_overlap
from utils.inference.classifier import Classifier
from utils.inference.outputs import Outputs
from utils.inference.rejection import most_probable
from utils.metrics.classification import evaluation_metrics
from utils.metrics.intervals import wilson_interval
from utils.metrics.scores import Scores, expected_calibration_error
from utils.system.runtime import runtime
from utils.system.text import shorten_list

MAX_LISTED = 20
"""Classes listed in a note; `absent_classes` has all."""


@dataclass(frozen=True)
class Evaluation:
    """The outputs of a classifier on images, and what is computed from them.

    Attributes:
        checkpoint: path of the checkpoint.
        checkpoint_sha256: digest of the file that was loaded; a run in progress may have replaced it since.
        data: the list or folder that was evaluated.
        classifier: the classifier in the checkpoint.
        images: the evaluated images.
        outputs: the classifier's outputs for them.
        corrupted: corruption -> (correct predictions, images), on a random subset; "none" is the unchanged subset.
        ood: outputs for out-of-distribution images, if any.
        max_error: allowed error rate among accepted predictions, for the rejection metrics.
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
        """Scores of the calibrated probabilities."""
        return Scores.from_logits(self.outputs.logits, self.outputs.class_ids, self.classifier.temperature)

    @cached_property
    def raw_scores(self) -> Scores:
        """Scores of the probabilities without temperature scaling."""
        return Scores.from_logits(self.outputs.logits, self.outputs.class_ids)

    @cached_property
    def metrics(self) -> dict[str, Any]:
        """The content of `metrics.json`."""
        raw = self.raw_scores
        metrics = evaluation_metrics(self.scores, self.classifier.class_names)
        return {
            "checkpoint": str(self.checkpoint),
            "checkpoint_sha256": self.checkpoint_sha256,
            "data": self.data,
            "notes": self._notes(metrics["absent_classes"]),
            "temperature": self.classifier.temperature,
            **metrics,
            "raw": {
                "log_loss": float(raw.losses.mean()),
                "brier": float(raw.briers.mean()),
                "ece": expected_calibration_error(raw),
            },
            "rejection": self.rejection(self.max_error) if self.classifier.can_reject else None,
            "corruptions": {name: correct / n for name, (correct, n) in self.corrupted.items()},
        }

    def _notes(self, absent_classes: list[str]) -> list[str]:
        """Warnings to read before the metrics."""
        notes = count_overlap(self.checkpoint, self.classifier, self.images).notes
        if absent_classes:
            notes.append(f"No images, so excluded from the averages: {shorten_list(absent_classes, MAX_LISTED)}")
        classifier = self.classifier
        if classifier.calibration is None and classifier.temperature != 1:
            notes.append("Exported weights: probabilities are calibrated, but rejection needs the original checkpoint")
        elif classifier.calibration is None:
            notes.append("Probabilities are not calibrated: only the best checkpoint of a finished run is")
        elif classifier.raw:
            notes.append("Probabilities are not calibrated: raw was set, so the fitted temperature is not used")
        return notes

    def rejection(self, max_error: float) -> dict[str, float | int | list[float] | None]:
        """Rejection metrics, with thresholds that allow the error rate `max_error` on the validation images."""
        rejection = self.classifier.calibration.choose_rejection(max_error)
        accepted, *ood_accepted = (rejection.accepts(*inputs).numpy() for inputs in self._rejection_inputs)
        n, count, wrong = len(accepted), int(accepted.sum()), int((accepted & ~self.scores.correct).sum())
        row: dict[str, Any] = {
            "max_error": max_error,
            "min_probability": None if math.isinf(rejection.min_probability) else rejection.min_probability,
            "max_distance": rejection.max_distance,
            "accepted": count / n,
            "error": wrong / count if count else None,
            "error_interval": list(wilson_interval(wrong, count)),
        }
        if ood_accepted:
            row |= {"ood": len(ood_accepted[0]), "ood_rejected": 1 - ood_accepted[0].mean()}
        return row

    @cached_property
    def _rejection_inputs(self) -> list[tuple[Tensor, Tensor]]:
        """For the images, then any OOD images: probability of the predicted class, distance to the nearest class."""
        return [
            (
                most_probable(outputs.logits, self.classifier.temperature)[0],
                self.classifier.calibration.distances(outputs.embeddings),
            )
            for outputs in (self.outputs, self.ood)
            if outputs is not None
        ]


def evaluate_corrupted(
    classifier: Classifier, images: ImageList, outputs: Outputs, max_images: int, num_workers: int, batch_size: int
) -> dict[str, tuple[int, int]]:
    """Correct predictions and number of images under each corruption, on up to `max_images` images drawn at random.

    The entry "none" is for the same images without corruption, taken from `outputs`; of several ranks, rank 0 has it.
    """
    if max_images == 0:
        return {}
    drawn = sample_indices(images, max_images, seed=0)
    source = FileSource(select(images, drawn), classifier.preprocessing)
    loader = eval_loader(ImageDataset(source, classifier.transform, seed=0), batch_size, num_workers)
    bar = tqdm(iterate_batches(loader), "corrupting", len(loader), unit="batch", leave=False, disable=None)
    correct = torch.zeros(len(CORRUPTIONS), dtype=torch.int64)
    for number, (pixels, class_ids) in enumerate(bar):
        batch = runtime.rank + number * runtime.world_size
        for i, corruption in enumerate(CORRUPTIONS.values()):
            _, logits = classifier.forward(corrupt(pixels, corruption, seed=batch))
            correct[i] += (logits.argmax(dim=1) == class_ids).sum()
    runtime.add(correct)
    counts = dict(zip(CORRUPTIONS, correct.tolist(), strict=True))
    if runtime.is_main:
        unchanged = (outputs.logits.argmax(dim=1) == outputs.class_ids)[drawn].sum()
        counts = {"none": int(unchanged)} | counts
    return {name: (count, len(drawn)) for name, count in counts.items()}
