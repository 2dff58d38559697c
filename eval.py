"""Evaluate a checkpoint on a list or a folder: `python eval.py`, see `--help`."""

from __future__ import annotations

import utils.system.startup  # noqa: F401, before torch

# isort: split

import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import tyro

from nets.weights.digest import digest_file
from utils.config.other_names import suggest_name
from utils.config.train_config import Device
from utils.data.image_list import ImageList, cut, read_classes
from utils.evaluation.compare import compare as compare_scores
from utils.evaluation.compare import flipped_rows, format_comparison, format_flipped
from utils.evaluation.eval_lists import check_classes, count_overlap, own_images, read_images, read_ood_images
from utils.evaluation.evaluation import Evaluation, evaluate_corrupted
from utils.evaluation.gallery import shown_images
from utils.evaluation.mistakes import worst_mistakes
from utils.evaluation.output_parts import IMAGES, OOD, OutputParts
from utils.evaluation.plots import plot_confusion
from utils.evaluation.report_files import format_metrics, write_comparison, write_events, write_metrics
from utils.evaluation.report_page import MAX_WORST, render
from utils.inference.classifier import BATCH, Classifier, load_classifier
from utils.inference.fit_calibration import read_embeddings
from utils.inference.outputs import Outputs, compute_outputs
from utils.metrics.scores import Scores, finite_rows
from utils.runs.checkpoint import find_checkpoint, given_model
from utils.runs.folder import METRICS_FOLDER, is_run, results_folder
from utils.runs.run_table import format_runs
from utils.system import cli
from utils.system.files import make_writable, read_json, write_text, write_whole
from utils.system.part import Part
from utils.system.runtime import runtime
from utils.system.text import shorten_list

PAGE = "report.html"


def main(
    model: tyro.conf.Positional[str] = "",
    data: str = "",
    model_path: str = "",
    classes_path: str = "",
    out: str = "",
    compare: tuple[str, str] | None = None,
    list_runs: Annotated[bool, tyro.conf.arg(name="list")] = False,
    ood: str = "",
    raw: bool = False,
    max_error: float = 0.05,
    corrupted: int = 200,
    part: str = "",
    merge: bool = False,
    batch_size: int = BATCH,
    num_workers: int = 2,
    device: Device = "auto",
) -> None:
    """Evaluate a checkpoint on a list or a folder: write metrics, and a report page that shows the mistakes.

    Args:
        model: as model_path.
        data: a list, or a folder with one subfolder of images per class; empty: the run's test list, else its
            validation list.
        model_path: a checkpoint, a run's folder, or a folder of runs (the newest is used); empty: logs/.
        classes_path: class file of the list, checked against the checkpoint's classes; empty: that of its project.
        out: output folder; empty: the run's folder, for other images than its own eval/ in it, or metrics_out for a
            checkpoint outside a run.
        list_runs: print a table of the runs in model_path, and exit.
        compare: two model paths: test whether the second is better than the first.
        ood: folder of images that belong to no class; the report shows how many are rejected.
        raw: use the network's own probabilities, without the temperature fitted after training.
        max_error: allowed error rate among accepted predictions, for the rejection metrics.
        corrupted: number of random images to also test with mild blur, noise, rotation, ...; 0: none.
        part: only compute the outputs for one part of the images, such as 3/16, and write them to the output folder;
            then the same command with merge, on one machine, evaluates them.
        merge: read the outputs that all parts have written.
        batch_size: images per batch.
        num_workers: processes that load images; 0: load in the main process.
        device: auto, cuda, cpu or mps.
    """
    chosen = runtime.first(lambda: check_options(batch_size, num_workers, corrupted, max_error, out, part, merge))
    model_path = given_model(model, model_path)
    if list_runs:
        print(format_runs(model_path or "logs"))
        return
    if compare:
        if model_path or ood or part or merge:
            raise ValueError("compare can't be combined with model_path, ood, part or merge: leave them out")
        checkpoints = runtime.first(lambda: [find_checkpoint(path) for path in compare])
        classifiers = [open_classifier(path, device, raw)[0] for path in checkpoints]
        data, images, _ = runtime.first(lambda: choose_images(checkpoints[0], classifiers[0], data, classes_path))
        folder = runtime.first(lambda: make_writable(Path(out) if out else METRICS_FOLDER, "--out"))
        compare_classifiers(checkpoints, classifiers, images, data, folder, num_workers, batch_size)
        return

    times = [time.perf_counter()]
    checkpoint = runtime.first(lambda: find_checkpoint(model_path))
    classifier, sha256 = open_classifier(checkpoint, device, raw)
    data, images, own = runtime.first(lambda: choose_images(checkpoint, classifier, data, classes_path))
    print(f"checkpoint {checkpoint} on {data}")
    lists = {IMAGES: images} | ({OOD: runtime.first(lambda: read_ood_images(classifier, ood))} if ood else {})
    folder = runtime.first(lambda: open_folder(out, checkpoint, "" if own else data))
    parts = OutputParts(folder, sha256, classifier, lists, batch_size)
    if chosen:
        file = compute_part(parts, chosen, num_workers)
        print(f"part {chosen} is written to {file}; when all are: the same command with --merge in place of --part")
        return
    if (earlier := read_json(folder / "metrics.json").get("data", data)) != data:
        print(f"warning: the results for {cli.printable(str(earlier))} in {folder} are replaced; --out keeps both")
    times.append(time.perf_counter())
    outputs = parts.read() if merge else compute_all(parts, num_workers)
    if ood:
        runtime.first(lambda: report_skipped(lists[OOD], outputs[OOD]))
    times.append(time.perf_counter())
    corruptions = evaluate_corrupted(classifier, images, outputs[IMAGES], corrupted, num_workers, batch_size)
    times.append(time.perf_counter())
    evaluation = Evaluation(
        checkpoint, sha256, data, classifier, images, outputs[IMAGES], corruptions, outputs.get(OOD), max_error
    )
    runtime.first(lambda: report(folder, evaluation, times))


def report(folder: Path, evaluation: Evaluation, times: list[float]) -> None:
    """Print the metrics, write the report, and print how long each phase took, whose starts are `times`."""
    print(format_metrics(evaluation.metrics))
    for note in evaluation.metrics["notes"]:
        print(f"warning: {cli.printable(note)}")
    write_report(folder, evaluation)
    times.append(time.perf_counter())
    phases = zip(("loading", "inference", "corruptions", "report"), times, times[1:], strict=False)
    print(", ".join(f"{name} {end - start:.1f} s" for name, start, end in phases))
    print(f"written to {folder}/; open {folder / PAGE}")


def check_options(
    batch_size: int, num_workers: int, corrupted: int, max_error: float, out: str, part: str, merge: bool
) -> Part | None:
    """The part that is chosen, if any.

    Raises:
        ValueError: an option is invalid.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size}: must be 1 or more")
    if num_workers < 0 or corrupted < 0:
        raise ValueError(f"num_workers={num_workers}, corrupted={corrupted}: must be 0 or more")
    if not 0 <= max_error < 1:
        raise ValueError(f"max_error={max_error}: must be at least 0 and below 1")
    cli.check_folder("out", out)
    if part and merge:
        raise ValueError("part and merge: choose one of them")
    if merge and runtime.world_size > 1:
        raise ValueError("merge: reads what is computed, so start it with python, not with torchrun")
    return Part.parse(part) if part else None


def open_classifier(checkpoint: Path, device: Device, raw: bool) -> tuple[Classifier, str]:
    """The classifier in a checkpoint, and the SHA-256 of the file; they are the same on all ranks."""
    sha256 = digest_file(checkpoint)
    classifier = load_classifier(checkpoint, device, raw)
    runtime.check_same({"checkpoint": sha256, "precision": classifier.precision})
    return classifier, sha256


def open_folder(out: str, checkpoint: Path, other_data: str) -> Path:
    """The output folder, which can be written to; see `results_folder`."""
    return make_writable(Path(out) if out else results_folder(checkpoint, other_data), "--out")


def choose_images(
    checkpoint: Path, classifier: Classifier, data: str, classes_path: str
) -> tuple[str, ImageList, bool]:
    """The path of the images to evaluate on, the images, and whether they are of the run's own lists."""
    if not data and (own := own_images(checkpoint, classifier)):
        if classes_path:
            check_classes(read_classes(classes_path), classifier.class_names, classes_path)
        return *own, True
    data = data or ("cls_test.txt" if Path("cls_test.txt").is_file() else "cls_val.txt")
    return data, read_images(data, classes_path, classifier.class_names), False


def compute_all(parts: OutputParts, num_workers: int) -> dict[str, Outputs]:
    """The outputs for all images of each list."""
    titles = {IMAGES: "evaluating", OOD: OOD}
    return {
        name: infer(parts.classifier, images, num_workers, parts.batch_size, titles[name], ood=name == OOD)
        for name, images in parts.lists.items()
    }


def compute_part(parts: OutputParts, part: Part, num_workers: int) -> Path:
    """Compute the outputs for a part of the images, and write them to its file."""
    lists = {name: cut(parts.lists[name], rows) for name, rows in parts.rows(part).items() if rows}
    outputs = compute_all(replace(parts, lists=lists), num_workers)
    return runtime.first(lambda: parts.write(part, outputs))


def infer(
    classifier: Classifier, images: ImageList, num_workers: int, batch_size: int, title: str, ood: bool = False
) -> Outputs:
    """Compute the classifier's outputs for images, on rank 0; unreadable OOD images are skipped.

    Raises:
        ImageError: an image can't be read.
        ValueError: an output isn't finite.
    """
    outputs = compute_outputs(classifier, images, num_workers, batch_size, skip_unreadable=ood, title=title)
    runtime.first(lambda: check_finite(classifier, images, outputs))
    return outputs


def check_finite(classifier: Classifier, images: ImageList, outputs: Outputs) -> None:
    """Raise a ValueError if an output isn't finite."""
    if len(broken := (~finite_rows(outputs.logits)).nonzero()):
        first = images.path(int(outputs.indices[broken[0]]))
        raise ValueError(f"{first}, one of {len(broken)} affected images: {classifier.non_finite_message}")


def report_skipped(images: ImageList, outputs: Outputs) -> None:
    """Print a warning for each unreadable OOD image.

    Raises:
        ValueError: none can be read.
    """
    if not len(outputs.indices):
        raise ValueError(f"ood: none of the {len(images)} images can be read")
    for i in sorted(set(range(len(images))) - set(outputs.indices.tolist())):
        print(f"warning: unreadable OOD image skipped: {cli.printable(images.path(i))}")


def compare_classifiers(
    checkpoints: list[Path],
    classifiers: list[Classifier],
    images: ImageList,
    data: str,
    folder: Path,
    num_workers: int,
    batch_size: int,
) -> None:
    """Evaluate two classifiers on the same images; print and write whether the second is better than the first.

    Raises:
        ValueError: their classes differ.
    """
    a, b = classifiers
    names = a.class_names
    if set(names) != set(b.class_names):
        only_a, only_b = sorted(set(names) - set(b.class_names)), sorted(set(b.class_names) - set(names))
        raise ValueError(
            f"compare: the classes differ (only in the first: {shorten_list(only_a)}; only in the second: "
            f"{shorten_list(only_b)}); give two checkpoints with the same classes"
        )
    print(f"A: {checkpoints[0]}\nB: {checkpoints[1]}\non {data}")
    outputs_a = infer(a, images, num_workers, batch_size, "A")
    outputs_b = infer(b, images, num_workers, batch_size, "B")
    runtime.first(lambda: report_comparison(checkpoints, classifiers, images, data, folder, outputs_a, outputs_b))


def report_comparison(
    checkpoints: list[Path],
    classifiers: list[Classifier],
    images: ImageList,
    data: str,
    folder: Path,
    outputs_a: Outputs,
    outputs_b: Outputs,
) -> None:
    """Print and write whether the second of two classifiers is better than the first."""
    a, b = classifiers
    names = a.class_names
    columns = {name: k for k, name in enumerate(b.class_names)}
    reordered = outputs_b.logits[:, [columns[name] for name in names]]
    scores_a = Scores.from_logits(outputs_a.logits, outputs_a.class_ids, a.temperature)
    scores_b = Scores.from_logits(reordered, outputs_b.class_ids, b.temperature)
    overlaps = tuple(count_overlap(path, of, images) for path, of in zip(checkpoints, classifiers, strict=True))
    comparison = {"a": str(checkpoints[0]), "b": str(checkpoints[1]), "data": data}
    comparison |= compare_scores(scores_a, scores_b, overlaps)
    rows = flipped_rows(scores_a, scores_b, [images.path(i) for i in range(len(images))], names)
    print(f"{format_comparison(comparison)}\n{format_flipped(rows)}".rstrip())
    write_comparison(folder, comparison, rows)
    print(f"written to {folder}/comparison.json; all images that only one classifies correctly: {folder}/flipped.csv")


def write_report(folder: Path, evaluation: Evaluation) -> None:
    """Write the metrics, the report page, the confusion matrix as PNG and, in a run's folder, TensorBoard events."""
    classifier = evaluation.classifier
    write_metrics(folder, evaluation)
    confusion = plot_confusion(evaluation.scores.confusion, classifier.class_names)
    with write_whole(folder / "confusion_matrix.png") as file:
        confusion.savefig(file, format="png")
    train = read_embeddings(evaluation.checkpoint, classifier.calibration, len(classifier.class_names))
    write_text(folder / PAGE, render(evaluation, train))
    if is_run(folder):
        worst = shown_images(evaluation, worst_mistakes(evaluation.scores, MAX_WORST))
        write_events(folder, evaluation, confusion, worst)


if __name__ == "__main__":
    cli.run(main, suggest=suggest_name)
