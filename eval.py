"""Evaluate a checkpoint on a list or a folder: `python eval.py`, see `--help`."""

from __future__ import annotations

from pathlib import Path

from utils import cli
from utils.annotation import scan_folders
from utils.checkpoint import find_checkpoint
from utils.classifier import load_classifier
from utils.data import eval_loader
from utils.engine import compute_logits
from utils.lists import ImageList, read_classes, read_list
from utils.metrics import confusion_matrix, evaluation_metrics
from utils.report import format_metrics, write_evaluation


def main(
    data: str = "",
    model_path: str = "",
    classes_path: str = "model_data/cls_classes.txt",
    out: str = "metrics_out",
    batch_size: int = 32,
    num_workers: int = 2,
    device: str = "auto",
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
    checkpoint = find_checkpoint(model_path)
    classifier = load_classifier(checkpoint, device)
    data = data or ("cls_test.txt" if Path("cls_test.txt").is_file() else "cls_val.txt")
    print(f"checkpoint {checkpoint} on {data}")
    if Path(data).is_dir():
        images = list_folder(data, classifier.class_names)
    else:
        if Path(classes_path).is_file():
            check_classes(read_classes(classes_path), classifier.class_names, classes_path)
        images = read_list(data, len(classifier.class_names))

    loader = eval_loader(images, classifier.transform, batch_size, num_workers)
    logits, targets = compute_logits(classifier.network, loader, classifier.device, classifier.precision)
    metrics = evaluation_metrics(logits, targets, classifier.class_names)
    write_evaluation(out, metrics, confusion_matrix(logits, targets), classifier.class_names)
    print(f"{format_metrics(metrics)}\nwritten to {out}/")


def list_folder(folder: str, class_names: list[str]) -> ImageList:
    """The pictures in `folder`, whose folders are named after classes.

    Raises:
        ValueError: it has a folder that is no class of the checkpoint, no pictures, or several sets in it.
    """
    splits = scan_folders(folder).pictures
    if splits["val"] or splits["test"]:
        raise ValueError(f"{folder} has folders for training and testing: give the one to evaluate, {folder}/test")
    pictures = splits["train"]
    check_classes(list(pictures), class_names, folder, may_lack=True)
    entries = [(class_id, path) for class_id, name in enumerate(class_names) for path in pictures.get(name, ())]
    if not entries:
        raise ValueError(f"{folder} has no folder of pictures named after a class ({', '.join(class_names[:5])}, ...)")
    return ImageList.pack("", entries)


def check_classes(names: list[str], class_names: list[str], source: str, may_lack: bool = False) -> None:
    """Raise a ValueError that names the difference, unless `names`, from `source`, are the checkpoint's classes."""
    extra = sorted(set(names) - set(class_names))
    lacking = [] if may_lack else sorted(set(class_names) - set(names))
    moved = not may_lack and not extra and not lacking and names != class_names
    if extra or lacking or moved:
        told = f"only in {source}: {', '.join(extra) or 'none'}; only in the checkpoint: {', '.join(lacking) or 'none'}"
        raise ValueError(
            f"{source} has other classes than the checkpoint was trained on "
            f"({'the same in another order' if moved else told}); give the data or the checkpoint that goes with it"
        )


if __name__ == "__main__":
    cli.run(main)
