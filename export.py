"""Make one file of a checkpoint that takes pixels and needs none of this code: `python export.py`, see `--help`."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from nets.weights.seal import digest_file
from utils.data.image_list import ImageList, draw, take
from utils.evaluation.eval_lists import read_images
from utils.export.check import Comparison, ExportError, compare
from utils.export.formats import FORMATS, STEMS, describe_export, write_card
from utils.export.model_card import CHECKED, check_card, write_model_card
from utils.inference.classifier import Classifier, load_classifier
from utils.inference.exported_metadata import ExportedMetadata
from utils.runs.checkpoint import find_checkpoint
from utils.runs.folder import read_run_list
from utils.system import cli
from utils.system.files import format_bytes, write_json, write_whole

PRECISIONS = {"onnx": ("fp32", "fp16", "int8"), "pt2": ("fp32",), "safetensors": ("fp32", "fp16")}


def main(
    model_path: str = "",
    format: Literal["onnx", "pt2", "safetensors"] = "onnx",
    precision: Literal["fp32", "fp16", "int8"] = "fp32",
    out: str = "",
    data: str = "",
    classes_path: str = "model_data/cls_classes.txt",
    check_images: int = 500,
    card: bool = False,
) -> None:
    """Make one file of a checkpoint, and check on real images that it gives what the checkpoint gives.

    Args:
        model_path: a checkpoint, a run's folder, or a folder of runs, of which the newest counts; empty: logs/.
        format: onnx: for ONNX Runtime and whatever else reads it; pt2: for torch alone, torch.export; safetensors: the
            weights, with a JSON card, for the model_path of train.py and predict.py.
        precision: fp16: the weights take half the room, of onnx and safetensors; int8: a quarter, at some cost in
            accuracy, of onnx only.
        out: folder for what is written; empty: "export" in the checkpoint's folder.
        data: a list, or a folder with a folder of images per class, to check with; empty: the run's validation list.
        classes_path: names the class ids of a list that data names, to be compared with the checkpoint's classes.
        check_images: how many images to check with, drawn evenly from the classes.
        card: also write a model card, README.md, beside it: classes, counts, what eval.py found, limits, how to load,
            and the hashes of all exported files there.
    """
    check(format, precision, check_images, out)
    checkpoint = find_checkpoint(model_path)
    classifier = load_classifier(checkpoint, "cpu", precision="fp32")
    images = images_to_check(checkpoint, classifier, data, classes_path)
    drawn = take(images, draw(images, check_images, seed=0, by_class=True))
    facts = describe_export(classifier, checkpoint, precision)
    path = Path(out or checkpoint.parent / "export", STEMS[precision] + FORMATS[format].suffix)
    path.parent.mkdir(parents=True, exist_ok=True)
    if card:
        check_card(path.parent)
    print(f"checkpoint {checkpoint}, to {path}")
    export(classifier, facts, format, drawn, path)
    if format == "safetensors":
        write_card(path, facts)
    print(f"written to {path}, {format_bytes(path.stat().st_size)}")
    if card:
        print(f"written to {write_model_card(path.parent, checkpoint, classifier, facts)}")


def check(format: str, precision: str, check_images: int, out: str) -> None:
    """Raise a ValueError that names what can't work."""
    if precision not in PRECISIONS[format]:
        raise ValueError(f"precision={precision} isn't for format={format}: take {' or '.join(PRECISIONS[format])}")
    cli.check_folder("out", out)
    if check_images < 1:
        raise ValueError(f"check_images={check_images}: give 1 or more; nothing is exported unchecked")


def images_to_check(checkpoint: Path, classifier: Classifier, data: str, classes_path: str) -> ImageList:
    """The images of `data`; if it is empty, of the run's validation list, in its folder or where its settings say.

    Raises:
        FileNotFoundError: there is no such list.
        ValueError: its classes aren't the checkpoint's.
    """
    config, names = classifier.config, classifier.class_names
    if data:
        return read_images(data, classes_path, names)
    of_run = read_run_list(checkpoint, config, names, "val")
    if of_run is not None:
        return of_run
    listed = config.get("val_annotation_path", "")
    if not Path(listed).is_file():
        raise FileNotFoundError(
            f"neither {checkpoint.parent} nor {listed or 'its file'} has the run's validation list, and nothing is "
            f"exported unchecked: name a list or a folder of class folders with --data"
        )
    return read_images(listed, classes_path, names)


def export(classifier: Classifier, facts: ExportedMetadata, format: str, images: ImageList, path: Path) -> None:
    """Write a classifier to `path`, which gets the name only if it gives what the classifier gives, and a report beside
    it. If it doesn't, the report is called `.failed.json`, and what had the name before is as it was.

    Raises:
        ExportError: it gives something else.
    """
    precision = facts.provenance["precision"]
    failed = path.with_name(f"{path.name}.failed.json")
    with write_whole(path) as file:
        FORMATS[format].write(classifier, facts, file)
        file.flush()
        unfinished = Path(file.name)
        comparison = compare(classifier, FORMATS[format].open(unfinished, classifier), images)
        report = {"file": path.name, "sha256": digest_file(unfinished), "format": format}
        report |= facts.provenance | comparison.as_dict(precision)
        print(format_comparison(comparison))
        if fault := comparison.fault(precision):
            write_json(failed, report)
            worst = ", ".join(f"{name} ({off:.2g})" for name, off in comparison.worst()[:3])
            raise ExportError(
                f"the exported file differs from the checkpoint: {fault}. {f'Worst: {worst}. ' if worst else ''}"
                f"It isn't kept; see {failed}"
            )
    write_json(path.with_name(path.name + CHECKED), report)
    failed.unlink(missing_ok=True)


def format_comparison(comparison: Comparison) -> str:
    """What the check found, as lines for people."""
    n, before, after = len(comparison.paths), *comparison.accuracy
    told = [f"left out: {cli.printable(error)}" for error in comparison.unreadable]
    told.append(
        f"{n} images: the same class for {comparison.same_top1.sum()}, probabilities within "
        f"{comparison.difference.max():.1e}; top-1 {before:.2%} before, {after:.2%} exported"
    )
    return "\n".join(told)


if __name__ == "__main__":
    cli.run(main)
