"""Export a checkpoint to one file that runs without this code: `python export.py`, see `--help`."""

from __future__ import annotations

import utils.system.startup  # noqa: F401, before torch

# isort: split

from pathlib import Path
from typing import Literal

import tyro

from nets.weights.digest import digest_file
from utils.config.other_names import suggest_name
from utils.data.image_list import ImageList, sample_indices, select
from utils.evaluation.eval_lists import read_images
from utils.export.check import Comparison, ExportError, compare
from utils.export.formats import FORMATS, STEMS, describe_export, write_card
from utils.export.model_card import CHECKED, check_card, write_model_card
from utils.inference.classifier import Classifier, load_classifier
from utils.inference.exported_metadata import ExportedMetadata
from utils.runs.checkpoint import find_checkpoint, given_model
from utils.runs.folder import list_path, read_run_list
from utils.system import cli
from utils.system.files import format_bytes, make_writable, refuse_link, remove_abandoned, write_json, write_whole

PRECISIONS = {"onnx": ("fp32", "fp16", "int8"), "pt2": ("fp32",), "safetensors": ("fp32", "fp16")}


def main(
    model: tyro.conf.Positional[str] = "",
    model_path: str = "",
    format: Literal["onnx", "pt2", "safetensors"] = "onnx",
    precision: Literal["fp32", "fp16", "int8"] = "fp32",
    out: str = "",
    data: str = "",
    classes_path: str = "",
    check_images: int = 500,
    card: bool = False,
) -> None:
    """Export a checkpoint to one file, and check on real images that both give the same predictions.

    Args:
        model: as model_path.
        model_path: a checkpoint, a run's folder, or a folder of runs (the newest is used); empty: logs/.
        format: onnx: for ONNX Runtime; pt2: for torch alone (torch.export); safetensors: weights for the model_path of
            train.py and predict.py, with a JSON card.
        precision: weight precision; fp16: half the size, onnx and safetensors only; int8: a quarter of the size,
            slightly less accurate, onnx only.
        out: output folder; empty: "export" in the checkpoint's folder.
        data: a list, or a folder with one subfolder of images per class, to check with; empty: the run's validation
            list.
        classes_path: class file of the list in data, checked against the checkpoint's classes; empty: that of its
            project.
        check_images: number of images to check with, drawn evenly from the classes.
        card: also write a model card, README.md: classes, metrics of eval.py, limits, usage, file hashes.
    """
    check_options(format, precision, check_images, out)
    checkpoint = find_checkpoint(given_model(model, model_path))
    classifier = load_classifier(checkpoint, "cpu", precision="fp32")
    images = images_to_check(checkpoint, classifier, data, classes_path)
    images = select(images, sample_indices(images, check_images, seed=0, by_class=True))
    metadata = describe_export(classifier, checkpoint, precision)
    refuse_link(checkpoint.parent / "export")
    path = Path(out or checkpoint.parent / "export", STEMS[precision] + FORMATS[format].suffix)
    make_writable(path.parent, "--out")
    if card:
        check_card(path.parent)
    print(f"exporting {checkpoint} to {path}")
    export(classifier, metadata, format, images, path)
    if format == "safetensors":
        write_card(path, metadata)
    print(f"written to {path}, {format_bytes(path.stat().st_size)}")
    if card:
        print(f"written to {write_model_card(path.parent, checkpoint, classifier, metadata)}")


def check_options(format: str, precision: str, check_images: int, out: str) -> None:
    """Raise a ValueError for an invalid option."""
    if precision not in PRECISIONS[format]:
        allowed = " or ".join(PRECISIONS[format])
        raise ValueError(f"precision={precision}: not available for format={format}; use {allowed}")
    cli.check_folder("out", out)
    if check_images < 1:
        raise ValueError(f"check_images={check_images}: must be 1 or more; every export is checked")


def images_to_check(checkpoint: Path, classifier: Classifier, data: str, classes_path: str) -> ImageList:
    """The images of `data`; if it is empty, of the validation list in the run's folder, or else in its settings.

    Raises:
        FileNotFoundError: there is no such list.
        ValueError: the classes differ from the checkpoint's.
    """
    config, names = classifier.config, classifier.class_names
    if data:
        return read_images(data, classes_path, names)
    of_run = read_run_list(checkpoint, config, names, "val")
    if of_run is not None:
        return of_run
    path = list_path(config, "val")
    if not Path(path).is_file():
        raise FileNotFoundError(
            f"the run's validation list is neither in {checkpoint.parent} nor at {path or 'the path in its settings'}; "
            f"give a list or a folder of class folders to check the export with --data"
        )
    return read_images(path, classes_path, names)


def export(classifier: Classifier, metadata: ExportedMetadata, format: str, images: ImageList, path: Path) -> None:
    """Write the exported file to `path` if it passes the check on `images`, and a report of the check beside it.

    Raises:
        ExportError: the check failed: the report is `<path>.failed.json`, and an existing file at `path` is unchanged.
    """
    precision = metadata.provenance["precision"]
    failed = path.with_name(f"{path.name}.failed.json")
    remove_abandoned(path.parent, path.name)
    with write_whole(path) as file:
        FORMATS[format].write(classifier, metadata, file)
        file.flush()
        unfinished = Path(file.name)
        comparison = compare(classifier, FORMATS[format].open(unfinished, classifier), images)
        report = {"file": path.name, "sha256": digest_file(unfinished), "format": format}
        report |= metadata.provenance | comparison.as_dict(precision)
        print(format_comparison(comparison))
        if fault := comparison.fault(precision):
            write_json(failed, report)
            worst = ", ".join(f"{name} ({difference:.2g})" for name, difference in comparison.worst()[:3])
            raise ExportError(
                f"the exported file differs from the checkpoint: {fault}. {f'Worst: {worst}. ' if worst else ''}"
                f"It was deleted; see {failed}"
            )
    write_json(path.with_name(path.name + CHECKED), report)
    failed.unlink(missing_ok=True)


def format_comparison(comparison: Comparison) -> str:
    """The result of the check, as printed."""
    n, before, after = len(comparison.paths), *comparison.accuracy
    lines = [f"skipped: {cli.printable(error)}" for error in comparison.unreadable]
    lines.append(
        f"{n} images: {comparison.same_top1.sum()} with the same prediction, probabilities differ by up to "
        f"{comparison.difference.max():.1e}; top-1 {before:.2%} before export, {after:.2%} after"
    )
    return "\n".join(lines)


if __name__ == "__main__":
    cli.run(main, suggest=suggest_name, alone=True)
