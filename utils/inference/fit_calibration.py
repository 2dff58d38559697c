"""What is done once, after training: its best checkpoint is calibrated, and the embeddings for that are kept."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from utils.config.train_config import TrainConfig
from utils.data.image_list import ImageList, parse_list, sample_indices, select
from utils.inference.classifier import load_classifier
from utils.inference.outputs import compute_outputs
from utils.inference.rejection import Calibration, fit_calibration
from utils.system.files import write_bytes

EMBEDDINGS = "train_embeddings.safetensors"
MAX_EMBEDDINGS, MIN_PER_CLASS = 5000, 5
"""Training images whose embeddings are computed after training, at most, but so many of each class where there are
too many classes for that: means need no more."""


class TrainEmbeddings(NamedTuple):
    """Training images, and what the head is given of them, (n, C)."""

    images: ImageList
    embeddings: Tensor


def calibrate_checkpoint(
    checkpoint: Path, train_images: ImageList, val_images: ImageList, config: TrainConfig
) -> dict[str, Any]:
    """Fit what tells whether the answers of `checkpoint` can be believed; see `utils.inference.rejection`.

    The embeddings of training images that go into it are kept beside the checkpoint: `eval.py` shows the nearest
    beside a mistake.

    Returns:
        What the checkpoint is to hold of it.
    """
    classifier = load_classifier(checkpoint, config.device)
    most = max(MAX_EMBEDDINGS, MIN_PER_CLASS * len(classifier.class_names))
    drawn = select(train_images, sample_indices(train_images, most, config.seed, by_class=True))
    of_train = compute_outputs(classifier, drawn, config.num_workers, skip_unreadable=True, title="embedding")
    of_val = compute_outputs(classifier, val_images, config.num_workers, skip_unreadable=True, title="calibrating")
    if not len(of_val.indices) or not len(of_train.indices):
        print("warning: no image could be read to calibrate on; probabilities stay the network's own")
        return {}
    calibration = fit_calibration(
        of_val.logits, of_val.embeddings, of_val.class_ids, of_train.embeddings, of_train.class_ids
    )
    train = TrainEmbeddings(select(drawn, of_train.indices.numpy()), of_train.embeddings)
    write_embeddings(checkpoint, train, calibration)
    print(f"calibrated on {len(of_val.indices)} validation images: temperature {calibration.temperature:.2f}")
    return calibration.as_dict()


def write_embeddings(checkpoint: Path, train: TrainEmbeddings, calibration: Calibration) -> None:
    """Write what a checkpoint makes of training images to a file beside it, in fp16."""
    tensors = {"embeddings": train.embeddings.half(), "list": torch.from_numpy(train.images.buffer.copy())}
    write_bytes(checkpoint.with_name(EMBEDDINGS), safetensors.torch.save(tensors, {"of": _digest(calibration)}))


def read_embeddings(checkpoint: Path, calibration: Calibration | None, num_classes: int) -> TrainEmbeddings | None:
    """What `write_embeddings` wrote for a checkpoint with this calibration; None if there is nothing, or nothing that
    can be used, which is printed."""
    path = checkpoint.with_name(EMBEDDINGS)
    if calibration is None or not path.is_file():
        return None
    try:
        with safe_open(path, "pt") as file:
            if (file.metadata() or {}).get("of") != _digest(calibration):
                return None
            embeddings, entries = file.get_tensor("embeddings"), file.get_tensor("list")
        images = parse_list(entries.numpy(), path)
        fits = embeddings.shape == (len(images), len(calibration.centre)) and embeddings.isfinite().all()
        if not fits or images.class_ids.max(initial=0) >= num_classes:
            raise ValueError("its parts don't fit together")
    except (OSError, ValueError, TypeError, SafetensorError) as error:
        print(f"warning: {path} can't be used ({error}); no training images are shown beside mistakes")
        return None
    return TrainEmbeddings(images, embeddings.float())


def _digest(calibration: Calibration) -> str:
    """What no other checkpoint has."""
    return hashlib.sha256(calibration.directions.numpy().tobytes()).hexdigest()
