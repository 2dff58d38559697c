"""Folders of pictures, one per class, become lists and a class file."""

from __future__ import annotations

import hashlib
import os
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from utils import demo
from utils.config import TrainConfig
from utils.lists import read_classes, read_list, write_classes, write_list

SPLITS = ("train", "val", "test")
IMAGE_SUFFIXES = frozenset(
    [
        ".jpg",
        ".jpeg",
        ".jpe",
        ".jfif",
        ".png",
        ".bmp",
        ".gif",
        ".tif",
        ".tiff",
        ".webp",
        ".ppm",
        ".pgm",
        ".jp2",
        ".avif",
    ]
)


@dataclass
class Scan:
    """What lies in the folders.

    Attributes:
        pictures: split -> class -> paths, sorted.
        skipped: class -> why -> number of files passed over; the class "" stands for what lies outside class folders.
        demo_set_aside: whether built-in digits were passed over because there are other pictures.
    """

    pictures: dict[str, dict[str, list[str]]] = field(default_factory=lambda: {split: {} for split in SPLITS})
    skipped: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    demo_set_aside: bool = False

    def count(self, split: str, name: str) -> int:
        return len(self.pictures[split].get(name, ()))


def scan_folders(datasets_path: str | Path) -> Scan:
    """Find the pictures under `datasets_path/<split>/<class>/` or `datasets_path/<class>/`, at any depth below.

    The built-in digits are passed over where there are other pictures.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: there is a val or test folder and no train folder.
    """
    root = Path(datasets_path)
    if not root.is_dir():
        raise FileNotFoundError(f"there is no folder {root}: make it and put a folder of pictures per class into it")
    splits = [split for split in SPLITS if (root / split).is_dir()]
    if splits and "train" not in splits:
        raise ValueError(f"{root} has a folder {splits[0]} and none named train: put the training classes into train")
    scan = Scan()
    for split in splits or ["train"]:
        folder = root / split if splits else root
        for entry in sorted(folder.iterdir()):
            if entry.is_dir() and not entry.name.startswith("."):
                scan.pictures[split][entry.name] = sorted(_pictures_below(entry, scan.skipped[entry.name]))
            elif entry.suffix.lower() in IMAGE_SUFFIXES and not entry.name.startswith("."):
                scan.skipped[""]["outside the class folders"] += 1
    _set_demo_aside(scan)
    for split in SPLITS:
        for name in [name for name, paths in scan.pictures[split].items() if not paths]:
            del scan.pictures[split][name]
            scan.skipped[name]["no pictures" if not splits else f"no pictures in {split}"] += 1
    return scan


def _pictures_below(folder: Path, skipped: Counter[str]) -> Iterator[str]:
    for where, folders, files in os.walk(folder):
        for name in (*folders, *files):
            if name.startswith("."):
                skipped["hidden"] += 1
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in (name for name in files if not name.startswith(".")):
            suffix = os.path.splitext(name)[1].lower()
            if suffix not in IMAGE_SUFFIXES:
                skipped[f"not a picture ({suffix or 'no suffix'})"] += 1
            else:
                yield Path(where, name).as_posix()


def _is_demo(path: str) -> bool:
    return os.path.basename(path).startswith(demo.PREFIX)


def _set_demo_aside(scan: Scan) -> None:
    everything = [path for classes in scan.pictures.values() for paths in classes.values() for path in paths]
    if all(map(_is_demo, everything)):
        return
    for classes in scan.pictures.values():
        for name, paths in classes.items():
            classes[name] = [path for path in paths if not _is_demo(path)]
            if len(classes[name]) < len(paths):
                scan.skipped[name]["built-in digits"] += len(paths) - len(classes[name])
                scan.demo_set_aside = True


def split_validation(pictures: dict[str, list[str]], val_fraction: float, seed: int) -> dict[str, list[str]]:
    """Take `val_fraction` of each class out of `pictures`, at least one of each class that has two, and return them.

    Which ones depends on seed and path only: a picture that is added moves hardly any other to the other side.
    """
    taken = {}
    for name, paths in pictures.items():
        count = max(1, round(len(paths) * val_fraction)) if len(paths) > 1 else 0
        drawn = sorted(paths, key=lambda path: hashlib.sha256(os.fsencode(f"{seed}:{path}")).digest())[:count]
        taken[name] = sorted(drawn)
        pictures[name] = sorted(set(paths) - set(drawn))
    return {name: paths for name, paths in taken.items() if paths}


def choose_classes(scan: Scan, classes_path: str | Path) -> list[str]:
    """The class names: those in the class file if there is one, else the folders, sorted; the file is then written.

    A class file of the built-in digits doesn't count once these have given way to other pictures.

    Raises:
        ValueError: too few classes have training pictures.
    """
    found = sorted(scan.pictures["train"])
    path = Path(classes_path)
    if path.is_file():
        names = read_classes(path)
        of_demo = names == list(demo.CLASSES)
        if set(names) & set(found) and not (of_demo and scan.demo_set_aside):
            return names
        if not of_demo:
            raise ValueError(
                f"{path} names {_some(names)}, and none of them is a folder with training pictures "
                f"(found: {_some(found)}): correct it, or delete it to have it written from the folders"
            )
        print(f"{path} named the built-in digits and is written anew")
    if len(found) < 2:
        raise ValueError(f"training pictures in {len(found)} class folders ({_some(found)}); two at least are needed")
    write_classes(path, found)
    return found


def annotate(
    datasets_path: str | Path = "datasets",
    classes_path: str | Path = "model_data/cls_classes.txt",
    train_annotation_path: str | Path = "cls_train.txt",
    val_annotation_path: str | Path = "cls_val.txt",
    test_annotation_path: str | Path = "cls_test.txt",
    val_fraction: float = 0.1,
    seed: int = 11,
) -> None:
    """Write the lists and, where there is none, the class file; print a table of what went where and what was skipped.

    The validation list comes from the val folder, else out of the training pictures; the test list is written where
    there are test pictures. The same folders give the same bytes.

    Args:
        datasets_path: holds train/, val/, test/ with a folder per class in each, or the class folders themselves.
        classes_path: the class file.
        train_annotation_path: where the training list goes.
        val_annotation_path: where the validation list goes.
        test_annotation_path: where the test list goes.
        val_fraction: the part of each class that is taken for validation, above 0 and below 1.
        seed: another seed takes other pictures for validation.

    Raises:
        FileNotFoundError: there is no folder `datasets_path`.
        ValueError: the folders or the class file can't make a training set; the message says why.
    """
    if not 0 < val_fraction < 1:
        raise ValueError(f"val_fraction={val_fraction}: give a number above 0 and below 1")
    scan = scan_folders(datasets_path)
    names = choose_classes(scan, classes_path)
    if not scan.pictures["val"]:
        scan.pictures["val"] = split_validation(scan.pictures["train"], val_fraction, seed)
        print(f"no val folder with pictures: {val_fraction:.0%} of each class is taken out of train for validation")
    targets = dict(zip(SPLITS, (train_annotation_path, val_annotation_path, test_annotation_path), strict=True))
    for split, target in targets.items():
        entries = [
            (class_id, _relative(path, target))
            for class_id, name in enumerate(names)
            for path in scan.pictures[split].get(name, ())
        ]
        if entries or split != "test":
            write_list(target, entries)
        else:
            Path(target).unlink(missing_ok=True)
    print(format_table(scan, names))
    print(f"written: {', '.join(str(target) for target in targets.values() if Path(target).is_file())}")


def format_table(scan: Scan, names: list[str]) -> str:
    """A row a class: pictures in each split, and what was skipped and why; then what needs attention."""
    everywhere = sorted({name for split in SPLITS for name in scan.pictures[split]} | set(scan.skipped) - {""})
    rows = [("class", *SPLITS, "skipped")]
    for name in [*names, *(name for name in everywhere if name not in names)]:
        counts = [str(scan.count(split, name)) if name in names else "-" for split in SPLITS]
        reasons = [f"{count} {reason}" for reason, count in sorted(scan.skipped.get(name, Counter()).items())]
        left_out = sum(scan.count(split, name) for split in SPLITS)
        if name not in names and left_out:
            reasons.append(
                f"{left_out} not in the class file" if scan.count("train", name) else f"{left_out} not in train"
            )
        rows.append((name, *counts, ", ".join(reasons)))
    totals = [str(sum(scan.count(split, name) for name in names)) for split in SPLITS]
    outside = ", ".join(f"{count} {reason}" for reason, count in scan.skipped.get("", Counter()).items())
    rows.append(("all", *totals, outside))
    widths = [max(len(_printable(row[column])) for row in rows) for column in range(4)]
    lines = [
        "  ".join([_printable(row[0]).ljust(widths[0]), *(row[c].rjust(widths[c]) for c in (1, 2, 3)), row[4]]).rstrip()
        for row in rows
    ]
    for split in ("train", "val"):
        absent = [name for name in names if not scan.count(split, name)]
        if absent:
            lines.append(f"attention: no {split} pictures of {_some(absent)}")
    return "\n".join(lines)


def ensure_lists(config: TrainConfig, datasets_path: str | Path = "datasets") -> None:
    """Make the lists that `config` names, where training would otherwise fail or use the wrong pictures.

    Without a training list the folders are annotated; with nothing in them the built-in digits are written first.
    Lists of the built-in digits give way as soon as there are other pictures. Lists elsewhere than at their default
    places are the user's, and left alone.
    """
    own_paths = (config.train_annotation_path, config.val_annotation_path) != (
        TrainConfig.train_annotation_path,
        TrainConfig.val_annotation_path,
    )
    if own_paths:
        return
    has_list = Path(config.train_annotation_path).is_file()
    if has_list and not _is_demo(read_list(config.train_annotation_path, num_classes=2**31).path(0)):
        return
    Path(datasets_path).mkdir(exist_ok=True)
    pictures = scan_folders(datasets_path).pictures
    found = [path for classes in pictures.values() for paths in classes.values() for path in paths]
    if has_list and found and all(map(_is_demo, found)):
        return
    if found:
        print(f"the lists are made from the pictures in {datasets_path}/")
    else:
        print(f"nothing in {datasets_path}/: writing the built-in set, handwritten digits, there")
        print("  for your own pictures put a folder per class there, see README.md")
        demo.write_demo(datasets_path)
    annotate(datasets_path, config.classes_path)


def _relative(path: str, list_path: str | Path) -> str:
    """`path` as a list at `list_path` holds it: an absolute one as it is, else relative to the list's folder."""
    if os.path.isabs(path):
        return path
    return Path(os.path.relpath(path, Path(list_path).parent)).as_posix()


def _some(names: list[str]) -> str:
    shown = ", ".join(_printable(name) for name in names[:5]) or "none"
    return shown if len(names) <= 5 else f"{shown} and {len(names) - 5} more"


def _printable(name: str) -> str:
    """A name that any terminal takes: bytes that aren't UTF-8 are shown as escapes."""
    return name.encode("utf-8", "backslashreplace").decode("utf-8")
