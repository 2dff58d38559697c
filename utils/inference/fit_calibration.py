"""Finish the best checkpoint after training: fit its head once more, calibrate it, and save the embeddings of training
images."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from utils.config.train_config import TrainConfig
from utils.data.image_list import ImageList, parse_list, sample_indices, select
from utils.inference.classifier import MAX_VIEWS, load_classifier
from utils.inference.outputs import Outputs, compute_outputs
from utils.inference.rejection import Calibration, fit_calibration
from utils.metrics.paired import is_worse
from utils.metrics.temperature import calibrated_losses, fit_temperature
from utils.system.files import write_bytes
from utils.system.runtime import runtime

if TYPE_CHECKING:
    from utils.training.linear_probe import Refit

EMBEDDINGS = "train_embeddings.safetensors"
MAX_EMBEDDINGS, MIN_PER_CLASS = 5000, 5
"""Number of training images whose embeddings are computed: at most the first, or the second times the number of
classes if that is more. The class means need no more."""

MAX_TTA_IMAGES = 200
"""Validation images, at most, to which the temperature for TTA is fitted: each takes five or ten forward passes."""


class Fitted(NamedTuple):
    """What is fitted after training.

    Attributes:
        calibration: `Calibration.as_dict()`; empty if no image can be read.
        head: weight and bias of the new head; empty: the trained one is better, or `refit_head` is off.
    """

    calibration: dict[str, Any]
    head: tuple[Tensor, ...] = ()


class TrainEmbeddings(NamedTuple):
    """Training images and their embeddings (n, C)."""

    images: ImageList
    embeddings: Tensor


def calibrate_checkpoint(
    checkpoint: Path, train_images: ImageList, val_images: ImageList, config: TrainConfig
) -> Fitted:
    """Fit a `utils.inference.rejection.Calibration` for `checkpoint`, and with `refit_head` its head.

    The embeddings of training images are saved beside the checkpoint. `eval.py` uses them to show the nearest training
    image of each mistake.
    """
    classifier = load_classifier(checkpoint, config.device)
    max_embeddings = max(MAX_EMBEDDINGS, MIN_PER_CLASS * len(classifier.class_names))
    sample = select(train_images, sample_indices(train_images, max_embeddings, config.seed, by_class=True))
    options = {"num_workers": config.num_workers, "skip_unreadable": True}
    train = compute_outputs(classifier, sample, title="embedding", keep_logits=False, **options)
    val = compute_outputs(classifier, val_images, title="calibrating", **options)
    tta_images = select(val_images, sample_indices(val_images, MAX_TTA_IMAGES, config.seed))
    batch_size = max(1, MAX_VIEWS // classifier.tta_views.shape[0])
    tta = compute_outputs(classifier, tta_images, batch_size=batch_size, title="calibrating TTA", tta=True, **options)
    refit = config.refit_head and len(sample) == len(train_images)
    if config.refit_head and not refit:
        print(f"refit_head: not done, since there are more than {max_embeddings} training images")
    balanced = "balanced" in (config.sampler, config.class_weights)
    return runtime.first(lambda: _fit(checkpoint, sample, train, val, tta, refit, balanced))


def _fit(
    checkpoint: Path, sample: ImageList, train: Outputs, val: Outputs, tta: Outputs, refit: bool, balanced: bool
) -> Fitted:
    """Fit head and calibration to outputs for training and validation images, and for some of the latter with TTA, and
    save the embeddings of training images."""
    if not len(val.indices) or not len(train.indices):
        print("warning: not calibrated, since no image could be read; the network's own probabilities are used")
        return Fitted({})
    head = _refit(train, val, balanced) if refit else None
    if head:  # calibrated with the head that hasn't seen the validation images
        val, tta = (outputs._replace(logits=head.probe.predict(outputs.embeddings)) for outputs in (val, tta))
    calibration = fit_calibration(val.logits, val.embeddings, val.class_ids, train.embeddings, train.class_ids)
    if len(tta.indices):
        calibration = replace(calibration, tta_temperature=fit_temperature(tta.logits, tta.class_ids))
    train_images = select(sample, train.indices.numpy())
    write_embeddings(checkpoint, TrainEmbeddings(train_images, train.embeddings), calibration)
    print(f"calibrated on {len(val.indices)} validation images: temperature {calibration.temperature:.2f}")
    return Fitted(calibration.as_dict(), (head.weight, head.bias) if head else ())


def _refit(train: Outputs, val: Outputs, balanced: bool) -> Refit | None:
    """The head fitted once more; None: it can't be, or is significantly worse than the trained one, without the
    validation images."""
    from utils.training.linear_probe import refit_head  # imports scikit-learn

    known = train.class_ids.unique()
    if len(known) < 2 or not torch.isin(val.class_ids, known).any():
        print("refit_head: not done, since it needs two classes, and validation images of them")
        return None
    arrays = (x.numpy() for x in (train.embeddings, train.class_ids, val.embeddings, val.class_ids))
    refit = refit_head(*arrays, val.logits.shape[1], balanced)
    (old, old_correct), (new, new_correct) = (
        (calibrated_losses(logits, val.class_ids).numpy(), (logits.argmax(dim=1) == val.class_ids).numpy())
        for logits in (val.logits, refit.probe.predict(val.embeddings))
    )
    worse = is_worse(new, new_correct, old, old_correct)
    used = "the trained head is used, since the new one is worse" if worse else "the new head is used"
    print(
        f"refit_head: regression on {len(train.indices)} training images, C={refit.probe.inverse_penalty:.1g}: "
        f"calibrated validation loss {old.mean():.3f} -> {new.mean():.3f}, top-1 {old_correct.mean():.1%} -> "
        f"{new_correct.mean():.1%}; then on {len(val.indices)} validation images, too; {used}"
    )
    return None if worse else refit


def write_embeddings(checkpoint: Path, train: TrainEmbeddings, calibration: Calibration) -> None:
    """Write embeddings of training images to a file beside the checkpoint, in fp16."""
    tensors = {"embeddings": train.embeddings.half(), "list": torch.from_numpy(train.images.buffer.copy())}
    write_bytes(checkpoint.with_name(EMBEDDINGS), safetensors.torch.save(tensors, {"of": _digest(calibration)}))


def read_embeddings(checkpoint: Path, calibration: Calibration | None, num_classes: int) -> TrainEmbeddings | None:
    """Read the file of `write_embeddings`; None if it is missing, damaged or of another calibration."""
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
            raise ValueError("its contents are inconsistent")
    except (OSError, ValueError, TypeError, SafetensorError) as error:
        print(f"warning: {path} can't be used ({error}); no training images are shown with mistakes")
        return None
    return TrainEmbeddings(images, embeddings.float())


def _digest(calibration: Calibration) -> str:
    """A digest that differs between checkpoints."""
    return hashlib.sha256(calibration.directions.numpy().tobytes()).hexdigest()
