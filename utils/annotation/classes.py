"""Choose the classes of a project from the class folders and an existing class file."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Literal

from utils.annotation.folder_scan import Scan, split_of
from utils.data.image_list import read_classes
from utils.system.text import count_of, shorten_list

ClassFile = Literal["keep", "add", "rewrite"]
"""What happens to an existing class file: it is kept, new folders are added at its end, or it is created anew."""
NOT_NAMED = "not in the class file"
Repeat = Callable[..., str]
"""Formats the command that is running, with some of its arguments changed."""


def choose_classes(scan: Scan, classes_path: str | Path, class_file: ClassFile, repeat: Repeat) -> list[str]:
    """Return the class names from the class file, or else the sorted folder names.

    Raises:
        ValueError: the class file matches no folder, or fewer than two classes have training images.
    """
    folders = sorted(scan.images["train"])
    path = Path(classes_path)
    if path.is_file() and class_file != "rewrite":
        names = read_classes(path)
        if set(names) & set(folders):
            # A folder that may be meant by one of the names is left to `remove_unused`.
            known = set(names) | {name.casefold() for name in names if name not in folders}
            new = [name for name in folders if not {name, name.casefold()} & known]
            return names + new if class_file == "add" else names
        if folders:
            raise ValueError(
                f"{path}: none of its classes ({shorten_list(names)}) is a folder with training images (there are: "
                f"{shorten_list(folders)}); correct it, or create it from the folders: {repeat(class_file='rewrite')}"
            )
    if len(folders) < 2:
        skipped = sum((Counter(reasons) for reasons in scan.skipped.values()), Counter())
        details = "; skipped: " + ", ".join(f"{n} {why}" for why, n in skipped.items()) if skipped else ""
        raise ValueError(
            f"at least two classes are needed, each a folder of images in datasets/train/ or datasets/; folders with "
            f"training images: {shorten_list(folders)}{details}{_inner_folders(scan, repeat)}"
        )
    return folders


def _inner_folders(scan: Scan, repeat: Repeat) -> str:
    """Return how to read the folders in the only folder, if it has several."""
    found = [(folder / name, inside) for folder, nested in scan.subfolders.items() for name, inside in nested.items()]
    if len(found) != 1 or len(found[0][1]) < 2:
        return ""
    ((folder, inside),) = found
    return f". {folder} has the folders {shorten_list(sorted(inside))}: to read these, {repeat(datasets_path=folder)}"


def check_nesting(scan: Scan, classes_path: str | Path, repeat: Repeat) -> None:
    """Raise a ValueError if class folders look like splits: most of the folders in them have the same names."""
    for folder, nested in scan.subfolders.items():
        counts = Counter(name for names in nested.values() for name in names)
        shared = sorted(name for name, count in counts.items() if count > 1)
        if len(shared) < 2 or 2 * len(shared) < len(counts):
            continue
        tops, inner = shorten_list(list(nested)), shorten_list(shared)
        lines = [f"{folder}: {tops} contain no images themselves, but folders of the same names ({inner})"]
        if all(map(split_of, shared)):
            first = next(iter(nested))
            lines += [
                f"if {inner} are splits of one data set: move them to the top, as {folder}/{shared[0]}/{first}/",
                f"if {tops} are data sets: choose one, {repeat(datasets_path=folder / first)}",
            ]
        else:
            lines += [
                f"if {inner} are the classes: {repeat(classes_from='leaf', **_fitting(shared, classes_path))}",
                f"if {tops} are splits: rename them to train, val and test",
            ]
        lines.append(f"if {tops} are the classes: {repeat(classes_from='top', **_fitting(nested, classes_path))}")
        raise ValueError("\n  ".join(lines))


def _fitting(names: Iterable[str], classes_path: str | Path) -> dict[str, str]:
    """Return the argument to rewrite an existing class file if it has none of `names`."""
    fits = not Path(classes_path).is_file() or set(names) & set(read_classes(classes_path))
    return {} if fits else {"class_file": "rewrite"}


def remove_unused(scan: Scan, names: list[str]) -> None:
    """Move the images of all other classes than `names` from `scan.images` to `scan.unused`.

    Raises:
        ValueError: such a class differs only in case from one of `names` that has no images in this split.
    """
    by_case = {name.casefold(): name for name in names}
    for split, classes in scan.images.items():
        for name in classes.keys() - set(names):
            meant = by_case.get(name.casefold())
            if meant and not classes.get(meant):
                raise ValueError(
                    f"the {split} folder {name} and the class {meant} differ only in upper and lower case: rename one "
                    f"of them"
                )
    for name in {name for classes in scan.images.values() for name in classes} - set(names):
        scan.remove_class(name, NOT_NAMED if name in scan.images["train"] else "no training images")


def nesting_notes(scan: Scan, classes_from: str, repeat: Repeat) -> list[str]:
    """Return notes about the folders below the class folders, to print: what other classes they could be."""
    folders = {name: sorted(set(map(os.path.dirname, paths))) for name, paths in scan.images["train"].items()}
    total = sum(map(len, folders.values()))
    if classes_from == "leaf":
        merged = [f"{name} ({shorten_list(places, 2)})" for name, places in sorted(folders.items()) if len(places) > 1]
        command = repeat(classes_from="path", class_file="rewrite")
        note = f"note: folders of the same name are one class: {shorten_list(merged)}; to keep them apart: {command}"
        return [note] if merged else []
    if classes_from != "auto" or total == len(folders) or max(map(len, folders.values())) < 2:
        return []
    leaves = {os.path.basename(place) for places in folders.values() for place in places}
    command = repeat(classes_from="leaf" if len(leaves) == total else "path", class_file="rewrite")
    classes = count_of(len(folders), "class")
    return [f"note: {classes} of {total} folders with images; to make each of these folders a class: {command}"]
