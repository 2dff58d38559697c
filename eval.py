"""Evaluate a checkpoint on a list or a folder: `python eval.py`, see `--help`."""

from __future__ import annotations

import utils.system.startup  # noqa: F401, before torch

# isort: split

import time
from pathlib import Path
from typing import Annotated

import tyro

from nets.weights.digest import digest_file
from utils.config.other_names import suggest_name
from utils.config.train_config import Device
from utils.data.image_list import ImageList, read_classes
from utils.evaluation.compare import compare as compare_scores
from utils.evaluation.compare import flipped_rows, format_comparison, format_flipped
from utils.evaluation.eval_lists import check_classes, count_overlap, own_images, read_images, read_ood_images
from utils.evaluation.evaluation import Evaluation, evaluate_corrupted
from utils.evaluation.gallery import shown_images
from utils.evaluation.mistakes import worst_mistakes
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
        batch_size: images per batch.
        num_workers: processes that load images; 0: load in the main process.
        device: auto, cuda, cpu or mps.
    """
    check_options(batch_size, num_workers, corrupted, max_error, out)
    model_path = given_model(model, model_path)
    if list_runs:
        print(format_runs(model_path or "logs"))
        return
    if compare:
        if model_path or ood:
            raise ValueError("compare can't be combined with model_path or ood: leave them out")
        checkpoints = [find_checkpoint(path) for path in compare]
        classifiers = [load_classifier(path, device, raw) for path in checkpoints]
        data, images, _ = choose_images(checkpoints[0], classifiers[0], data, classes_path)
        folder = make_writable(Path(out) if out else METRICS_FOLDER, "--out")
        compare_classifiers(checkpoints, classifiers, images, data, folder, num_workers, batch_size)
        return

    times = [time.perf_counter()]
    checkpoint = find_checkpoint(model_path)
    sha256 = digest_file(checkpoint)
    classifier = load_classifier(checkpoint, device, raw)
    data, images, own = choose_images(checkpoint, classifier, data, classes_path)
    print(f"checkpoint {checkpoint} on {data}")
    ood_images = read_ood_images(classifier, ood) if ood else None
    folder = make_writable(Path(out) if out else results_folder(checkpoint, "" if own else data), "--out")
    if (earlier := read_json(folder / "metrics.json").get("data", data)) != data:
        print(f"warning: the results for {cli.printable(str(earlier))} in {folder} are replaced; --out keeps both")
    times.append(time.perf_counter())
    outputs = infer(classifier, images, num_workers, batch_size, "evaluating")
    ood_outputs = infer(classifier, ood_images, num_workers, batch_size, "ood", ood=True) if ood_images else None
    times.append(time.perf_counter())
    corruptions = evaluate_corrupted(classifier, images, outputs, corrupted, num_workers, batch_size)
    times.append(time.perf_counter())
    evaluation = Evaluation(checkpoint, sha256, data, classifier, images, outputs, corruptions, ood_outputs, max_error)
    print(format_metrics(evaluation.metrics))
    for note in evaluation.metrics["notes"]:
        print(f"warning: {cli.printable(note)}")
    write_report(folder, evaluation)
    times.append(time.perf_counter())
    phases = zip(("loading", "inference", "corruptions", "report"), times, times[1:], strict=False)
    print(", ".join(f"{name} {end - start:.1f} s" for name, start, end in phases))
    print(f"written to {folder}/; open {folder / PAGE}")


def check_options(batch_size: int, num_workers: int, corrupted: int, max_error: float, out: str) -> None:
    """Raise a ValueError for an invalid option."""
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size}: must be 1 or more")
    if num_workers < 0 or corrupted < 0:
        raise ValueError(f"num_workers={num_workers}, corrupted={corrupted}: must be 0 or more")
    if not 0 <= max_error < 1:
        raise ValueError(f"max_error={max_error}: must be at least 0 and below 1")
    cli.check_folder("out", out)


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


def infer(
    classifier: Classifier, images: ImageList, num_workers: int, batch_size: int, title: str, ood: bool = False
) -> Outputs:
    """Compute the classifier's outputs for images; unreadable OOD images are skipped with a warning.

    Raises:
        ImageError: an image can't be read.
        ValueError: an output isn't finite, or no OOD image can be read.
    """
    outputs = compute_outputs(classifier, images, num_workers, batch_size, skip_unreadable=ood, title=title)
    if len(broken := (~finite_rows(outputs.logits)).nonzero()):
        first = images.path(int(outputs.indices[broken[0]]))
        raise ValueError(f"{first}, one of {len(broken)} affected images: {classifier.non_finite_message}")
    if not len(outputs.indices):
        raise ValueError(f"ood: none of the {len(images)} images can be read")
    for i in sorted(set(range(len(images))) - set(outputs.indices.tolist())):
        print(f"warning: unreadable OOD image skipped: {cli.printable(images.path(i))}")
    return outputs


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
