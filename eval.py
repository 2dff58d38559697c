"""Evaluate a checkpoint on a list or a folder: `python eval.py`, see `--help`."""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from pathlib import Path

from nets.weights.seal import digest_file
from utils.config.train_config import Device
from utils.data.image_list import ImageList
from utils.evaluation.compare import compare as compare_scores
from utils.evaluation.compare import flipped_rows, format_comparison, format_flipped
from utils.evaluation.eval_lists import count_seen, read_images, read_ood_images
from utils.evaluation.evaluation import Evaluation, evaluate_corrupted
from utils.evaluation.gallery import shown_images
from utils.evaluation.mistakes import worst_mistakes
from utils.evaluation.report_files import format_metrics, write_comparison, write_events, write_numbers
from utils.evaluation.report_page import WORST, render
from utils.inference.classifier import BATCH, Classifier, load_classifier
from utils.inference.fit_calibration import read_embeddings
from utils.inference.outputs import Outputs, compute_outputs
from utils.metrics.scores import Scores
from utils.runs.checkpoint import find_checkpoint
from utils.runs.folder import METRICS_OUT, is_run, results_folder
from utils.system import cli
from utils.system.files import PARTIAL, read_json, write_text

PAGE = "report.html"


def main(
    data: str = "",
    model_path: str = "",
    classes_path: str = "model_data/cls_classes.txt",
    out: str = "",
    compare: tuple[str, str] | None = None,
    ood: str = "",
    raw: bool = False,
    max_error: float = 0.05,
    corrupted: int = 200,
    batch_size: int = BATCH,
    num_workers: int = 2,
    device: Device = "auto",
) -> None:
    """Evaluate a checkpoint on a list or a folder: numbers, and a page that shows what is wrong.

    Args:
        data: a list, or a folder with a folder of images per class; empty: cls_test.txt, else cls_val.txt.
        model_path: a checkpoint, a run's folder, or a folder of runs, of which the newest counts; empty: logs/.
        classes_path: names the class ids of a list, to be compared with the checkpoint's classes.
        out: folder for what is written; empty: the run's, or metrics_out for a checkpoint that lies elsewhere.
        compare: two of what model_path may be, to find out whether the second is better than the first.
        ood: folder of images that are of none of the classes: how many are rejected goes into the report.
        raw: take the probabilities as the network gives them, without the temperature fitted after training.
        max_error: part of the accepted answers that may be wrong, for the figures on rejection.
        corrupted: how many images, drawn at random, are also tried a little blurred, noisy, turned, ...; 0: none.
        batch_size: images that go through the network at a time.
        num_workers: processes that load images; 0: none besides the main one.
        device: auto, cuda, cpu or mps.
    """
    check(batch_size, num_workers, corrupted, max_error, out)
    data = data or ("cls_test.txt" if Path("cls_test.txt").is_file() else "cls_val.txt")
    if compare:
        if model_path or ood:
            raise ValueError("compare names its two checkpoints and takes no ood: leave off model_path and ood")
        checkpoints = [find_checkpoint(path) for path in compare]
        a, b = (load_classifier(path, device, raw) for path in checkpoints)
        images = read_images(data, classes_path, a.class_names)
        folder = prepare(Path(out) if out else METRICS_OUT)
        compare_classifiers(checkpoints, (a, b), images, data, folder, num_workers, batch_size)
        return
    started = time.perf_counter()
    checkpoint = find_checkpoint(model_path)
    sha256 = digest_file(checkpoint)
    classifier = load_classifier(checkpoint, device, raw)
    print(f"checkpoint {checkpoint} on {data}")
    images = read_images(data, classes_path, classifier.class_names)
    ood_images = read_ood_images(classifier, ood) if ood else None
    folder = prepare(Path(out) if out else results_folder(checkpoint))
    if (earlier := read_json(folder / "metrics.json").get("data", data)) != data:
        print(f"warning: what {folder} has of {cli.printable(str(earlier))} is replaced; --out would keep both")
    times = [started, time.perf_counter()]
    outputs = infer(classifier, images, num_workers, batch_size)
    ood_outputs = infer_ood(classifier, ood_images, num_workers, batch_size) if ood_images else None
    times.append(time.perf_counter())
    worse = evaluate_corrupted(classifier, images, outputs, corrupted, num_workers, batch_size)
    times.append(time.perf_counter())
    evaluation = Evaluation(checkpoint, sha256, data, classifier, images, outputs, worse, ood_outputs, max_error)
    print(format_metrics(evaluation.metrics))
    for note in evaluation.metrics["notes"]:
        print(f"warning: {cli.printable(note)}")
    write_report(folder, evaluation)
    times.append(time.perf_counter())
    parts = zip(("loading", "inference", "corruptions", "report"), times, times[1:], strict=False)
    print(", ".join(f"{name} {end - start:.1f} s" for name, start, end in parts))
    print(f"written to {folder}/; open {folder / PAGE}")


def check(batch_size: int, num_workers: int, corrupted: int, max_error: float, out: str) -> None:
    """Raise a ValueError that names what can't work."""
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size}: give 1 or more")
    if num_workers < 0 or corrupted < 0:
        raise ValueError(f"num_workers={num_workers}, corrupted={corrupted}: give 0 or more")
    if not 0 <= max_error < 1:
        raise ValueError(f"max_error={max_error}: give a number from 0 to below 1")
    cli.check_folder("out", out)


def prepare(folder: Path) -> Path:
    """Make a folder to write to.

    Raises:
        OSError: it can't be made, or written to, which should be known before hours are spent.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f"{secrets.token_hex(4)}{PARTIAL}"
        probe.open("xb").close()
        probe.unlink()
    except OSError as error:
        raise type(error)(f"nothing can be written to {folder} ({error.strerror}): name another with --out") from error
    return folder


def infer(
    classifier: Classifier, images: ImageList, num_workers: int, batch_size: int, title: str = "evaluating"
) -> Outputs:
    """What a classifier makes of images.

    Raises:
        ImageError: one can't be read.
        ValueError: an output isn't finite.
    """
    outputs = compute_outputs(classifier, images, num_workers, batch_size, title=title)
    check_finite(classifier, images, outputs)
    return outputs


def check_finite(classifier: Classifier, images: ImageList, outputs: Outputs) -> None:
    """Raise a ValueError that names an image for which an output isn't finite, if there is one."""
    if len(broken := (~outputs.logits.isfinite().all(dim=1)).nonzero()):
        first = images.path(int(outputs.indices[broken[0]]))
        raise ValueError(f"{first}, one of {len(broken)} such images: {classifier.non_finite_message}")


def infer_ood(classifier: Classifier, ood: ImageList, num_workers: int, batch_size: int) -> Outputs:
    """What a classifier makes of strangers; those that can't be read are named and left out.

    Raises:
        ValueError: none of them can, or an output isn't finite.
    """
    outputs = compute_outputs(classifier, ood, num_workers, batch_size, skip_unreadable=True, title="ood")
    check_finite(classifier, ood, outputs)
    unreadable = sorted(set(range(len(ood))) - set(outputs.indices.tolist()))
    if len(unreadable) == len(ood):
        raise ValueError(f"ood: none of the {len(ood)} images can be read")
    for i in unreadable:
        print(f"warning: a stranger that can't be read is left out: {cli.printable(ood.path(i))}")
    return outputs


def compare_classifiers(
    checkpoints: Sequence[Path],
    classifiers: tuple[Classifier, Classifier],
    images: ImageList,
    data: str,
    folder: Path,
    num_workers: int,
    batch_size: int,
) -> None:
    """Put two classifiers to the same images; print and write whether the second is better.

    Args:
        checkpoints: their files.
        classifiers: what these hold.
        images: the images.
        data: where these are from.
        folder: where to write.
        num_workers: processes that load images.
        batch_size: images that go through a network at a time.

    Raises:
        ValueError: they tell other classes apart.
    """
    a, b = classifiers
    names = a.class_names
    if set(names) != set(b.class_names):
        extra, lacking = sorted(set(names) - set(b.class_names)), sorted(set(b.class_names) - set(names))
        raise ValueError(
            f"compare: the two have different classes (only in the first: {', '.join(extra) or 'none'}; only in the "
            f"second: {', '.join(lacking) or 'none'}), so their accuracies can't be compared"
        )
    what = dict(zip(("a", "b", "data"), (*map(str, checkpoints), data), strict=True))
    print("A: {a}\nB: {b}\non {data}".format(**what))
    outputs_a = infer(a, images, num_workers, batch_size, "A")
    outputs_b = infer(b, images, num_workers, batch_size, "B")
    in_order = outputs_b.logits[:, [b.class_names.index(name) for name in names]]
    scores_a = Scores.of(outputs_a.logits, outputs_a.class_ids, a.temperature)
    scores_b = Scores.of(in_order, outputs_b.class_ids, b.temperature)
    seen = tuple(count_seen(path, of, images) for path, of in zip(checkpoints, classifiers, strict=True))
    found = what | compare_scores(scores_a, scores_b, seen)
    rows = flipped_rows(scores_a, scores_b, [images.path(i) for i in range(len(images))], names)
    print(f"{format_comparison(found)}\n{format_flipped(rows)}".rstrip())
    write_comparison(folder, found, rows)
    print(f"written to {folder}/comparison.json, and all images that only one names right to {folder}/flipped.csv")


def write_report(folder: Path, evaluation: Evaluation) -> None:
    """Write the numbers, the page, the confusion matrix as an image and, in a run's folder, TensorBoard's events."""
    from utils.evaluation.plots import plot_confusion

    classifier = evaluation.classifier
    write_numbers(folder, evaluation)
    confusion = plot_confusion(evaluation.scores.confusion, classifier.class_names)
    confusion.savefig(folder / "confusion_matrix.png")
    train = read_embeddings(evaluation.checkpoint, classifier.calibration, len(classifier.class_names))
    write_text(folder / PAGE, render(evaluation, train))
    if is_run(folder):
        worst = shown_images(evaluation, worst_mistakes(evaluation.scores, WORST))
        write_events(folder, evaluation, confusion, worst)


if __name__ == "__main__":
    cli.run(main)
