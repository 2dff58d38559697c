"""The model card: a README.md for people who receive the exported files of a checkpoint."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np

from nets.weights.digest import digest_file
from nets.weights.license import UNKNOWN, clean_license, warning_of
from utils.export.formats import FORMATS, STEMS
from utils.inference.classifier import Classifier
from utils.inference.exported_metadata import ExportedMetadata
from utils.runs.folder import METRICS_FOLDER, OTHER_RESULTS, read_run_list
from utils.system.files import format_bytes, read_json, write_text
from utils.system.text import printable

CARD = "README.md"
TITLE = "# Image classifier of "
"""The first words of every card, by which a card is recognized."""
CHECKED = ".check.json"
"""Suffix of the check report beside an exported file."""
METRICS = {
    "top1": "top-1",
    "balanced_accuracy": "balanced accuracy",
    "macro_f1": "macro F1",
    "log_loss": "log-loss",
    "ece": "calibration error",
}
"""Keys of metrics.json shown in the card, with their titles."""


def write_model_card(folder: Path, checkpoint: Path, classifier: Classifier, metadata: ExportedMetadata) -> Path:
    """Write the card of a checkpoint and its exported files in `folder`, and return its path.

    The card is made from the checkpoint, the lists in its run's folder, and the metrics.json of eval.py.

    Raises:
        ValueError: metrics.json or a check report is malformed.
    """
    import jinja2  # slow to import, and only a card needs it

    template = Path(__file__).with_name("model_card.md").read_text(encoding="utf-8")
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined)
    environment.filters["text"] = escape
    license = clean_license((classifier.origin or {}).get("license"))
    files = exported_files(folder, metadata)
    page = environment.from_string(template).render(
        metadata=metadata,
        origin=classifier.origin,
        license=license or UNKNOWN,
        license_warning=warning_of(license),
        letterbox=classifier.preprocessing.letterbox_image,
        shape=classifier.preprocessing.input_shape,
        counts=count_images(checkpoint, classifier),
        refitted=classifier.config.get("refit_head", False),
        calibrated=classifier.calibration is not None
        or metadata.temperature != 1,  # exported weights have no calibration
        metrics=read_metrics(checkpoint, metadata.provenance["checkpoint_sha256"]),
        files=[(path.name, format_bytes(path.stat().st_size), digest_file(path)) for path in files],
        onnx=next((path.name for path in files if path.suffix == ".onnx"), ""),
    )
    write_text(folder / CARD, page)
    return folder / CARD


def check_card(folder: Path) -> None:
    """Raise a ValueError if `folder` has a README.md that is not a model card."""
    path = folder / CARD
    if path.is_file() and not path.read_bytes().startswith(TITLE.encode()):
        raise ValueError(
            f"{path} is not a model card and would be overwritten: move it, or give another folder with --out"
        )


def exported_files(folder: Path, metadata: ExportedMetadata) -> list[Path]:
    """The files in `folder` that passed the check as exports of this checkpoint and have not changed since.

    Raises:
        ValueError: a check report is malformed.
    """
    files = []
    for file in (folder / f"{stem}{form.suffix}" for form in FORMATS.values() for stem in STEMS.values()):
        path = file.with_name(file.name + CHECKED)
        if not path.is_file():
            continue
        report = read_json(path)
        if not {"checkpoint_sha256", "sha256"} <= report.keys():
            raise ValueError(f"{path} is malformed: delete it, or export again")
        same_checkpoint = report["checkpoint_sha256"] == metadata.provenance["checkpoint_sha256"]
        if same_checkpoint and file.is_file() and report["sha256"] == digest_file(file):
            files.append(file)
    return files


def escape(text: str) -> str:
    """Text on one line, within one, with everything special to Markdown or HTML escaped: class names can be anything.
    Of letters, digits and plain punctuation only what begins a link is escaped."""
    special = re.compile(r"[^\w \-,./:()%]|_|://|www\.", re.IGNORECASE)
    return special.sub(lambda match: "".join(f"&#{ord(char)};" for char in match[0]), printable(text))


def count_images(checkpoint: Path, classifier: Classifier) -> list[dict[str, Any]]:
    """Training and validation images per class; None without the run's lists."""
    names = classifier.class_names
    rows = [{"class": name, "train": None, "val": None} for name in names]
    for key in ("train", "val"):
        images = read_run_list(checkpoint, classifier.config, names, key)
        if images is not None:
            for row, count in zip(rows, np.bincount(images.class_ids, minlength=len(names)), strict=True):
                row[key] = int(count)
    return rows


def read_metrics(checkpoint: Path, checkpoint_sha256: str) -> dict[str, Any] | None:
    """The metrics that eval.py wrote for this state of the checkpoint, for the template: those on the run's own test
    list, else the newest; None if there are none.

    Raises:
        ValueError: a metrics.json is malformed.
    """
    others = sorted(checkpoint.parent.glob(f"{OTHER_RESULTS}/*/metrics.json"), key=lambda path: path.stat().st_mtime_ns)
    for path in (checkpoint.with_name("metrics.json"), *reversed(others), METRICS_FOLDER / "metrics.json"):
        if not path.is_file():
            continue
        metrics = read_json(path)
        try:
            if metrics["checkpoint_sha256"] == checkpoint_sha256:
                return _format_metrics(metrics)
        except (KeyError, TypeError, AttributeError, ValueError, OverflowError) as error:
            raise ValueError(f"{path} is malformed ({error!r:.80}): run python eval.py again") from error
    return None


def _format_metrics(metrics: dict[str, Any]) -> dict[str, Any]:
    intervals = metrics["intervals"]
    return {
        "data": str(metrics["data"]),
        "images": int(metrics["images"]),
        "notes": [str(note) for note in metrics["notes"]],
        "rows": [(title, format_value(metrics[key], intervals.get(key))) for key, title in METRICS.items()],
        "classes": [
            (str(row["class"]), int(row["support"]), format_value(row["recall"], row["recall_interval"]))
            for row in metrics["per_class"]
        ],
    }


def format_value(value: float | None, interval: list[float] | None) -> str:
    """A metric with its 95 % interval, if it has one."""
    if value is None:
        return "–"
    return f"{value:.3f}" + (f" ({interval[0]:.3f} to {interval[1]:.3f})" if interval else "")
