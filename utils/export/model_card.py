"""The model card: what a checkpoint is, for people who are handed its exported files."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np

from nets.weights.seal import digest_file
from utils.export.formats import FORMATS, STEMS
from utils.inference.classifier import Classifier
from utils.inference.exported_metadata import ExportedMetadata
from utils.runs.folder import METRICS_OUT, read_run_list
from utils.system.files import format_bytes, write_bytes
from utils.system.text import printable

CARD = "README.md"
TITLE = "# Image classifier of "
"""What every card begins with."""
CHECKED = ".check.json"
"""Suffix of the report beside an exported file, which the card goes by."""
FIGURES = {
    "top1": "top-1",
    "balanced_accuracy": "balanced accuracy",
    "macro_f1": "macro F1",
    "log_loss": "log loss",
    "ece": "calibration error",
}
"""The figures of metrics.json that a card shows, and their names."""


def write_model_card(folder: Path, checkpoint: Path, classifier: Classifier, facts: ExportedMetadata) -> Path:
    """Write a card for a checkpoint, and for its exported files in `folder`, beside them.

    What stands in it comes from the checkpoint, from the lists in its run's folder, and from what eval.py wrote.

    Returns:
        The card.

    Raises:
        ValueError: the run's metrics.json can't be read.
    """
    import jinja2  # takes a while, and only a card needs it

    template = Path(__file__).with_name("model_card.md").read_text(encoding="utf-8")
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined)
    environment.filters["text"] = escape
    files = exported_files(folder, facts)
    page = environment.from_string(template).render(
        facts=facts,
        origin=classifier.origin,
        letterbox=classifier.preprocessing.letterbox_image,
        shape=classifier.preprocessing.input_shape,
        counts=count_images(checkpoint, classifier),
        calibrated=classifier.calibration is not None or facts.temperature != 1,  # weights of export.py have only that
        metrics=read_metrics(checkpoint, facts.provenance["checkpoint_sha256"]),
        files=[(path.name, format_bytes(path.stat().st_size), digest_file(path)) for path in files],
        onnx=next((path.name for path in files if path.suffix == ".onnx"), ""),
    )
    write_bytes(folder / CARD, page.encode("utf-8"))
    return folder / CARD


def check_card(folder: Path) -> None:
    """Raise a ValueError if a README.md that is no model card stands where one is to be written."""
    path = folder / CARD
    if path.is_file() and not path.read_bytes().startswith(TITLE.encode()):
        raise ValueError(f"{path} is no model card, and would be overwritten: move it, or name a folder with --out")


def exported_files(folder: Path, facts: ExportedMetadata) -> list[Path]:
    """The files in `folder` that passed the check as exports of this checkpoint, and are as they were then.

    Raises:
        ValueError: a report isn't what export.py writes.
    """
    found = []
    for file in (folder / f"{stem}{form.suffix}" for form in FORMATS.values() for stem in STEMS.values()):
        path = file.with_name(file.name + CHECKED)
        if not path.is_file():
            continue
        try:
            report = json.loads(path.read_text(encoding="utf-8"))
            of_this = report["checkpoint_sha256"] == facts.provenance["checkpoint_sha256"]
            if of_this and file.is_file() and report["sha256"] == digest_file(file):
                found.append(file)
        except (KeyError, TypeError, ValueError, RecursionError) as error:
            raise ValueError(
                f"{path} isn't what export.py writes ({error!r:.80}): delete it, or export anew"
            ) from error
    return found


def escape(text: str) -> str:
    """Text that Markdown and HTML show as it is, in one line, also in a table: names of classes may be anything."""
    return re.sub(r"[^A-Za-z0-9 ]", lambda sign: f"&#{ord(sign[0])};", printable(text))


def count_images(checkpoint: Path, classifier: Classifier) -> list[dict[str, Any]]:
    """For each class how many images it was trained and chosen on; None where the run's lists are not there."""
    names = classifier.class_names
    rows = [{"class": name, "train": None, "val": None} for name in names]
    for key in ("train", "val"):
        images = read_run_list(checkpoint, classifier.config, names, key)
        if images is not None:
            for row, count in zip(rows, np.bincount(images.class_ids, minlength=len(names)), strict=True):
                row[key] = int(count)
    return rows


def read_metrics(checkpoint: Path, checkpoint_sha256: str) -> dict[str, Any] | None:
    """What eval.py wrote of this checkpoint, beside it or where findings of one in no run's folder go: on how many
    images of what, what to know first, and rows of figure, value and interval, and of class, support and recall with
    its interval. None if it wasn't run, or for another checkpoint, or an earlier state of this one.

    Raises:
        ValueError: the file isn't what eval.py writes.
    """
    found = (_read_metrics(folder / "metrics.json", checkpoint_sha256) for folder in (checkpoint.parent, METRICS_OUT))
    return next(filter(None, found), None)


def _read_metrics(path: Path, checkpoint_sha256: str) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        metrics = json.loads(path.read_text(encoding="utf-8"))
        if metrics["checkpoint_sha256"] != checkpoint_sha256:
            return None
        rows = [(name, metrics[key], metrics["intervals"].get(key)) for key, name in FIGURES.items()]
        classes = [
            (str(row["class"]), row["support"], row["recall"], row["recall_interval"]) for row in metrics["per_class"]
        ]
        return {
            "data": str(metrics["data"]),
            "images": int(metrics["images"]),
            "notes": [str(note) for note in metrics["notes"]],
            "rows": [(name, format_value(value, interval)) for name, value, interval in rows],
            "classes": [(name, int(n), format_value(value, interval)) for name, n, value, interval in classes],
        }
    except (KeyError, TypeError, AttributeError, ValueError, OverflowError, RecursionError) as error:
        raise ValueError(f"{path} isn't what eval.py writes ({error!r:.80}): run python eval.py again") from error


def format_value(value: float | None, interval: list[float] | None) -> str:
    """A figure with its interval of 95 %, as far as there is one."""
    if value is None:
        return "–"
    return f"{value:.3f}" + (f" ({interval[0]:.3f} to {interval[1]:.3f})" if interval else "")
