"""Evaluate a checkpoint on a list or a folder: `python eval.py`, see `--help`."""

from __future__ import annotations

from pathlib import Path

from utils import cli
from utils.checkpoint import find_checkpoint
from utils.classifier import load_classifier
from utils.config import Device
from utils.data import FileSource, ImageDataset, eval_loader
from utils.engine import compute_logits
from utils.lists import ImageList, list_in_memory, read_classes, read_list
from utils.metrics import confusion_matrix, evaluation_metrics
from utils.report import format_metrics, write_evaluation
from utils.scan import SPLIT_NAMES, Scan, scan_classes, set_demo_aside


def main(
    data: str = "",
    model_path: str = "",
    classes_path: str = "model_data/cls_classes.txt",
    out: str = "metrics_out",
    batch_size: int = 32,
    num_workers: int = 2,
    device: Device = "auto",
) -> None:
    """Evaluate a checkpoint on a list or a folder.

    Args:
        data: a list, or a folder with a folder of pictures per class; empty: cls_test.txt, else cls_val.txt.
        model_path: a checkpoint or a run's folder; empty: the best of the newest run in logs/.
        classes_path: names the class ids of a list, to be held against the checkpoint's classes.
        out: folder that gets metrics.json, confusion_matrix.csv and the plots.
        batch_size: pictures that go through the network at a time.
        num_workers: processes that load pictures; 0: none besides the main one.
        device: auto, cuda, cpu or mps.
    """
    if batch_size < 1 or num_workers < 0:
        raise ValueError(f"batch_size={batch_size}, num_workers={num_workers}: give 1 or more, and 0 or more")
    checkpoint = find_checkpoint(model_path)
    classifier = load_classifier(checkpoint, device)
    data = data or ("cls_test.txt" if Path("cls_test.txt").is_file() else "cls_val.txt")
    print(f"checkpoint {checkpoint} on {data}")
    if not Path(data).exists():
        raise FileNotFoundError(f"there is no list or folder {data}; a list is written by python txt_annotation.py")
    if Path(data).is_dir():
        images = list_folder(data, classifier.class_names)
    else:
        if Path(classes_path).is_file():
            check_classes(read_classes(classes_path), classifier.class_names, classes_path)
        images = read_list(data, len(classifier.class_names))

    dataset = ImageDataset(FileSource(images, classifier.preprocessing), classifier.transform, seed=0)
    loader = eval_loader(dataset, batch_size, num_workers)
    logits, targets = compute_logits(classifier.network, loader, classifier.device, classifier.precision)
    metrics = evaluation_metrics(logits, targets, classifier.class_names)
    write_evaluation(out, metrics, confusion_matrix(logits, targets), classifier.class_names)
    print(f"{format_metrics(metrics)}\nwritten to {out}/")


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
