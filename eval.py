"""Evaluate a checkpoint on a list or a folder: `python eval.py`, see `--help`."""

from __future__ import annotations

import os
import time
from collections import Counter
from pathlib import Path

from utils import cli
from utils.checkpoint import find_checkpoint
from utils.classifier import Classifier, load_classifier
from utils.compare import compare as compare_scores
from utils.compare import flipped_rows, format_comparison, format_flipped
from utils.config import Device
from utils.evaluation import Evaluation, evaluate_corrupted
from utils.finish import read_embeddings
from utils.gallery import shown_pictures
from utils.lists import ImageList, list_in_memory, read_classes, read_list
from utils.metrics import confusion_matrix
from utils.mistakes import worst_mistakes
from utils.outputs import BATCH, Outputs, compute_outputs
from utils.report import format_metrics, write_comparison, write_events, write_numbers
from utils.report_page import WORST, render
from utils.resume import CONFIG_FILE, LIST_FILES
from utils.scan import SPLIT_NAMES, Scan, pictures_below, scan_classes, set_demo_aside
from utils.scores import Scores

PAGE = "report.html"
OUT = "metrics_out"


def main(
    data: str = "",
    model_path: str = "",
    classes_path: str = "model_data/cls_classes.txt",
    out: str = "",
    compare: tuple[str, str] | None = None,
    strangers: str = "",
    raw: bool = False,
    max_error: float = 0.05,
    corrupted: int = 200,
    batch_size: int = BATCH,
    num_workers: int = 2,
    device: Device = "auto",
) -> None:
    """Evaluate a checkpoint on a list or a folder: numbers, and a page that shows what is wrong.

    Args:
        data: a list, or a folder with a folder of pictures per class; empty: cls_test.txt, else cls_val.txt.
        model_path: a checkpoint or a run's folder; empty: the best of the newest run in logs/.
        classes_path: names the class ids of a list, to be held against the checkpoint's classes.
        out: folder for what is written; empty: the run's, or metrics_out for a checkpoint that lies elsewhere.
        compare: two checkpoints or runs' folders, of which is asked whether the second is better than the first.
        strangers: folder of pictures that are of none of the classes: how many are rejected goes into the report.
        raw: take the probabilities as the network gives them, without the temperature fitted after training.
        max_error: part of the accepted answers that may be wrong, for the figures on rejection.
        corrupted: how many pictures, drawn at random, are also tried a little blurred, noisy, turned, ...; 0: none.
        batch_size: pictures that go through the network at a time.
        num_workers: processes that load pictures; 0: none besides the main one.
        device: auto, cuda, cpu or mps.
    """
    if batch_size < 1 or num_workers < 0 or corrupted < 0:
        raise ValueError(
            f"batch_size={batch_size}, num_workers={num_workers}, corrupted={corrupted}: give 1 or more, 0 or more"
        )
    if not 0 <= max_error < 1:
        raise ValueError(f"max_error={max_error}: give a number from 0 to below 1")
    data = data or ("cls_test.txt" if Path("cls_test.txt").is_file() else "cls_val.txt")
    if compare:
        compare_checkpoints(*map(find_checkpoint, compare), data, classes_path, Path(out or OUT), num_workers, device)
        return
    started = time.perf_counter()
    checkpoint = find_checkpoint(model_path)
    classifier = load_classifier(checkpoint, device, raw)
    print(f"checkpoint {checkpoint} on {data}")
    images = read_images(data, classes_path, classifier.class_names)
    loaded = time.perf_counter()
    outputs = compute_outputs(classifier, images, num_workers, batch_size)
    evaluation = Evaluation(
        checkpoint,
        data,
        classifier,
        images,
        outputs,
        evaluate_corrupted(classifier, images, corrupted, num_workers),
        evaluate_strangers(classifier, strangers, num_workers, batch_size) if strangers else None,
        max_error,
    )
    inferred = time.perf_counter()
    folder = Path(out) if out else own_folder(checkpoint)
    write_report(folder, evaluation)
    print(format_metrics(evaluation.metrics))
    print(
        f"loaded in {loaded - started:.1f} s, inference {inferred - loaded:.1f} s, report "
        f"{time.perf_counter() - inferred:.1f} s; written to {folder}/, of which open {folder / PAGE}"
    )


def own_folder(checkpoint: Path) -> Path:
    """Where results of a checkpoint go: into its run's folder, and into metrics_out if it lies elsewhere."""
    return checkpoint.parent if (checkpoint.parent / CONFIG_FILE).is_file() else Path(OUT)


def compare_checkpoints(
    path_a: Path, path_b: Path, data: str, classes_path: str, folder: Path, num_workers: int, device: Device
) -> None:
    """Evaluate two checkpoints on the same pictures; print and write whether the second is better.

    Raises:
        ValueError: they tell other classes apart.
    """
    a, b = (load_classifier(path, device) for path in (path_a, path_b))
    names = a.class_names
    if set(names) != set(b.class_names):
        extra, lacking = sorted(set(names) - set(b.class_names)), sorted(set(b.class_names) - set(names))
        raise ValueError(
            f"compare: the two tell other classes apart (only in the first: {', '.join(extra) or 'none'}; only in the "
            f"second: {', '.join(lacking) or 'none'}), so their accuracies can't be held against each other"
        )
    images = read_images(data, classes_path, names)
    print(f"A: {path_a}\nB: {path_b}\non {data}")
    outputs_a = compute_outputs(a, images, num_workers, title="A")
    outputs_b = compute_outputs(b, images, num_workers, title="B")
    scores_a = Scores.of(outputs_a.logits, outputs_a.class_ids, a.temperature)
    in_order = outputs_b.logits[:, [b.class_names.index(name) for name in names]]
    scores_b = Scores.of(in_order, outputs_b.class_ids, b.temperature)
    comparison = {"a": str(path_a), "b": str(path_b), "data": data} | compare_scores(scores_a, scores_b)
    rows = flipped_rows(scores_a, scores_b, [images.path(i) for i in range(len(images))], names)
    write_comparison(folder, comparison, rows)
    print(f"{format_comparison(comparison)}\n{format_flipped(rows)}".rstrip())
    print(f"written to {folder}/comparison.json, and all pictures that only one names right to {folder}/flipped.csv")


def write_report(folder: Path, evaluation: Evaluation) -> None:
    """Write the numbers, the page, the confusion matrix as a picture and, in a run's folder, TensorBoard's events."""
    from utils.plots import plot_confusion

    write_numbers(folder, evaluation)
    confusion = plot_confusion(confusion_matrix(evaluation.scores), evaluation.classifier.class_names)
    confusion.savefig(folder / "confusion_matrix.png")
    page = render(evaluation, read_embeddings(evaluation.checkpoint), notes(evaluation))
    (folder / PAGE).write_text(page, encoding="utf-8")
    if (folder / CONFIG_FILE).is_file():
        worst = shown_pictures(evaluation, worst_mistakes(evaluation.scores, WORST))
        write_events(folder, evaluation, confusion, worst)


def notes(evaluation: Evaluation) -> list[str]:
    """What a reader of the figures should know first."""
    told = []
    metrics, classifier = evaluation.metrics, evaluation.classifier
    if seen := count_trained_on(evaluation):
        told.append(
            f"{seen} of the {len(evaluation.images)} pictures were trained on: with new pictures the figures would be "
            f"worse"
        )
    if metrics["absent_classes"]:
        told.append(f"No pictures, so not in the means: {', '.join(metrics['absent_classes'])}")
    if classifier.calibration is None:
        told.append("Not calibrated, since its run was stopped before the end: probabilities are the network's own")
    elif classifier.raw:
        told.append("Probabilities are the network's own, as asked for: the fitted temperature isn't used")
    return told


def count_trained_on(evaluation: Evaluation) -> int:
    """How many of the pictures are in the training list that the run began with, by their paths."""
    copy = evaluation.checkpoint.with_name(LIST_FILES["train"])
    config, class_names = evaluation.classifier.config, evaluation.classifier.class_names
    if not copy.is_file():
        return 0
    trained = read_list(copy, len(class_names))
    folder = Path(config["train_annotation_path"]).parent
    known = {os.path.normpath(folder / trained.name(i)) for i in range(len(trained))}
    return sum(os.path.normpath(evaluation.images.path(i)) in known for i in range(len(evaluation.images)))


def evaluate_strangers(classifier: Classifier, folder: str, num_workers: int, batch_size: int) -> Outputs:
    """Outputs for the pictures in a folder and below, which are of no class."""
    if not Path(folder).is_dir():
        raise FileNotFoundError(f"strangers={folder!r}: there is no such folder")
    paths = pictures_below(folder, Counter())
    if not paths:
        raise ValueError(f"strangers={folder!r}: there are no pictures in it")
    if classifier.calibration is None or classifier.raw:
        raise ValueError("strangers: this classifier rejects nothing; let its run come to its end, and leave raw off")
    return compute_outputs(classifier, list_in_memory((0, path) for path in paths), num_workers, batch_size)


def read_images(data: str, classes_path: str, class_names: list[str]) -> ImageList:
    """The pictures of a list, or in a folder of class folders, whose classes are those of the checkpoint."""
    if not Path(data).exists():
        raise FileNotFoundError(f"there is no list or folder {data}; a list is written by python txt_annotation.py")
    if Path(data).is_dir():
        return list_folder(data, class_names)
    if Path(classes_path).is_file():
        check_classes(read_classes(classes_path), class_names, classes_path)
    return read_list(data, len(class_names))


def list_folder(folder: str, class_names: list[str]) -> ImageList:
    """The pictures in `folder`, whose folders are named after classes; what is passed over is printed.

    Raises:
        ValueError: it has a folder that is no class of the checkpoint, or no pictures.
    """
    scan = Scan()
    scan_classes(Path(folder), scan, "test")
    set_demo_aside(scan)
    pictures = scan.pictures["test"]
    if pictures.keys() <= SPLIT_NAMES.keys() - set(class_names):
        such_as = f", such as {folder}/test" if Path(folder, "test").is_dir() else ""
        raise ValueError(f"{folder} has no folders of pictures named after classes; give the one that has{such_as}")
    check_classes(list(pictures), class_names, folder, may_lack=True)
    for name, reasons in scan.skipped.items():
        for reason, count in reasons.items():
            print(f"passed over: {count} {reason}{f' ({name})' if name else ''}")
    return list_in_memory(
        (class_id, path) for class_id, name in enumerate(class_names) for path in pictures.get(name, ())
    )


def check_classes(names: list[str], class_names: list[str], source: str, may_lack: bool = False) -> None:
    """Raise a ValueError that names the difference, unless `names`, from `source`, are the checkpoint's classes."""
    extra = sorted(set(names) - set(class_names))
    lacking = [] if may_lack else sorted(set(class_names) - set(names))
    moved = not may_lack and not extra and not lacking and names != class_names
    if extra or lacking or moved:
        told = [f"only in {source}: {', '.join(extra)}"] if extra else []
        told += [f"only in the checkpoint: {', '.join(lacking)}"] if lacking else []
        raise ValueError(
            f"{source} has other classes than the checkpoint was trained on ("
            f"{'the same in another order' if moved else '; '.join(told)}); rename them, or give the data or the "
            f"checkpoint that goes with it"
        )


if __name__ == "__main__":
    cli.run(main)
