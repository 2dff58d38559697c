"""What is done once, after training: its best checkpoint is calibrated, and the embeddings for that are kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from utils.calibration import fit_calibration
from utils.classifier import load_classifier
from utils.config import TrainConfig
from utils.files import write_whole
from utils.lists import ImageList, list_in_memory, parse_list, sample_list
from utils.outputs import BATCH, compute_outputs

EMBEDDINGS = "train_embeddings.safetensors"
MOST_EMBEDDINGS = 5000
"""Training pictures whose embeddings are computed after training, at most: means of classes need no more."""


class TrainEmbeddings(NamedTuple):
    """Training pictures, and what the head is given of them, (n, C)."""

    images: ImageList
    embeddings: Tensor


def calibrate_checkpoint(
    train_images: ImageList, val_images: ImageList, config: TrainConfig, checkpoint: Path
) -> dict[str, Any]:
    """Fit what tells whether the answers of `checkpoint` can be believed; see `utils.calibration`.

    The embeddings of training pictures that go into it are kept beside the checkpoint: `eval.py` shows the nearest
    beside a mistake.

    Returns:
        What the checkpoint is to hold of it.
    """
    classifier = load_classifier(checkpoint, config.device)
    drawn = sample_list(train_images, MOST_EMBEDDINGS, config.seed)
    # How many are unreadable was judged in training; another of the class stands in.
    of_train = compute_outputs(classifier, drawn, config.num_workers, BATCH, 1.0, "embedding")
    of_val = compute_outputs(classifier, val_images, config.num_workers, BATCH, 1.0, "calibrating")
    calibration = fit_calibration(
        of_val.logits, of_val.embeddings, of_val.class_ids, of_train.embeddings, of_train.class_ids
    )
    write_embeddings(checkpoint, TrainEmbeddings(drawn, of_train.embeddings))
    print(f"calibrated on {len(val_images)} validation pictures: temperature {calibration.temperature:.2f}")
    return calibration.as_dict()


def write_embeddings(checkpoint: Path, train: TrainEmbeddings) -> None:
    """Write what a checkpoint makes of training pictures to a file beside it, in fp16."""
    entries = list_in_memory((int(class_id), train.images.path(i)) for i, class_id in enumerate(train.images.class_ids))
    tensors = {"embeddings": train.embeddings.half(), "list": torch.from_numpy(entries.buffer.copy())}
    with write_whole(checkpoint.with_name(EMBEDDINGS)) as file:
        file.write(safetensors.torch.save(tensors, {"checkpoint": checkpoint.name}))


def read_embeddings(checkpoint: Path) -> TrainEmbeddings | None:
    """What `write_embeddings` wrote for this checkpoint; None if there is nothing, or nothing that can be used, which
    is printed."""
    path = checkpoint.with_name(EMBEDDINGS)
    if not path.is_file():
        return None
    try:
        with safe_open(path, "pt") as file:
            if (file.metadata() or {}).get("checkpoint") != checkpoint.name:
                return None
            embeddings, entries = file.get_tensor("embeddings"), file.get_tensor("list")
        images = parse_list(entries.numpy(), path)
        if embeddings.ndim != 2 or len(embeddings) != len(images) or not embeddings.isfinite().all():
            raise ValueError("its parts don't fit together")
    except (OSError, ValueError, TypeError, SafetensorError) as error:
        print(f"attention: {path} can't be used ({error}); no training pictures are shown beside mistakes")
        return None
    return TrainEmbeddings(images, embeddings.float())
