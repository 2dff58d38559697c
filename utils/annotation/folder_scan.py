"""Find images in split and class folders."""

from __future__ import annotations

import os
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from utils.data.image_io import HEIF_SUFFIXES, IMAGE_SUFFIXES
from utils.data.image_list import normalize_class_name

HIDDEN = "."
"""Prefix of hidden files and folders."""
SYSTEM_FOLDERS = frozenset(
    {"$recycle.bin", "system volume information", "lost+found", "__macosx", "@eadir", "@recycle", "#recycle"}
    | {"@recently-snapshot", "#snapshot", "__pycache__"}
)
"""Folders that systems, network disks and archive programs create, in lower case; they count as hidden."""
SPLITS = ("train", "val", "test")
SPLIT_WORDS = {
    **dict.fromkeys(("train", "training", "训练"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev", "验证"), "val"),
    **dict.fromkeys(("test", "testing", "测试"), "test"),
}
FILLER_WORDS = frozenset(
    {"set", "data", "dataset", "image", "images", "img", "imgs", "photo", "photos", "picture", "pictures", "seg"}
    | {"split", "folder"}
)
"""Words that may stand beside a split word in the name of a split folder, such as `training_set` and `seg_test`."""
ClassesFrom = Literal["top", "leaf", "path"]
"""Which folder names the class of an image: the top one, the one that contains the image, or all on the way."""


@dataclass
class Scan:
    """The images found, and the skipped files.

    Attributes:
        images: split -> class -> sorted paths; only classes with images.
        skipped: class -> reason -> number of files; class "": files outside class folders.
        unused: folder -> why its images are not used -> number of images.
        subfolders: folder with class folders -> each class folder that holds no images itself -> its folders with
            images.
    """

    images: dict[str, dict[str, list[str]]] = field(default_factory=lambda: {split: {} for split in SPLITS})
    skipped: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    unused: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    subfolders: dict[Path, dict[str, set[str]]] = field(default_factory=lambda: defaultdict(dict))

    def count(self, split: str, name: str) -> int:
        """Return the number of images of a class in a split."""
        return len(self.images[split].get(name, ()))

    def paths(self) -> list[str]:
        """Return the paths of all images."""
        return [path for classes in self.images.values() for paths in classes.values() for path in paths]

    def remove_class(self, name: str, reason: str) -> None:
        """Move the images of a class to `unused`."""
        for classes in self.images.values():
            if images := len(classes.pop(name, ())):
                self.unused[name][reason] += images


def split_of(name: str) -> str | None:
    """Return the split that a folder's name stands for, such as "train" for `Training` and `seg_train`; else None."""
    words = re.findall(r"[^\W\d_]+", re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name).lower())
    stems = [re.sub(r"(set|data|集)$", "", word) for word in words if word not in FILLER_WORDS]
    return SPLIT_WORDS.get(stems[0]) if len(stems) == 1 else None


def scan_datasets(root: str | Path, classes_from: ClassesFrom = "top", ignore: Iterable[str | Path] = ()) -> Scan:
    """Find images at any depth under `<split>/<class>/`, or under `<class>/`.

    A split is a folder with a name such as train, Training, train_data, validation or test_set (see `split_of`) that
    contains folders. The folders in `ignore` are skipped.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: the train folder is missing beside other splits, or the splits contain no class folders.
    """
    root = Path(root)
    if not root.is_dir():
        raise FileNotFoundError(f"there is no folder {root}: create it with one folder of images per class")
    ignored = set(map(os.path.realpath, ignore))
    folders = [entry for entry in _folders(root) if os.path.realpath(entry) not in ignored]
    splits = {entry: split for entry in folders if (split := split_of(entry.name)) and _folders(entry)}
    scan = Scan()
    if not splits and len(folders) > 1 and all(split_of(entry.name) for entry in folders):
        raise ValueError(f"{root}: its split folders contain no class folders; put the images of each class in one")
    if splits and "train" not in splits.values():
        raise ValueError(f"{root}: it has {next(iter(splits)).name}/ but no train/; put class folders in train/")
    others = [entry for entry in folders if entry not in splits]
    if splits:
        for entry, split in splits.items():
            scan_classes(_innermost(entry), scan, split, classes_from)
        for entry in others:
            if images := len(find_images(entry, Counter())):
                unlabeled = "a split without class folders: put its images in folders named after their classes"
                beside = "beside the split folders: move it into one of them"
                scan.unused[entry.name][unlabeled if split_of(entry.name) else beside] += images
        _count_loose(root, scan)
    else:
        scan_classes(root, scan, "train", classes_from, only=others)
    return scan


def _innermost(split_folder: Path) -> Path:
    """Return the folder with the classes of a split, since archives often contain `test_set/test_set/<class>/`."""
    entries = list(split_folder.iterdir())
    folders = _folders(split_folder)
    repeated = len(folders) == 1 and split_of(folders[0].name) == split_of(split_folder.name)
    if repeated and _folders(folders[0]) and not any(entry.suffix.lower() in IMAGE_SUFFIXES for entry in entries):
        return _innermost(folders[0])
    return split_folder


def scan_classes(
    folder: Path, scan: Scan, split: str, classes_from: ClassesFrom = "top", only: Sequence[Path] | None = None
) -> None:
    """Add the images in the class folders of `folder`, by default all of them, to `scan`."""
    for entry in _folders(folder) if only is None else only:
        name = normalize_class_name(entry.name)
        images = find_images(entry, scan.skipped[name])
        parts_of = {parent: Path(parent).relative_to(folder).parts for parent in set(map(os.path.dirname, images))}
        for path in images:
            class_name = _class_of(parts_of[os.path.dirname(path)], classes_from)
            scan.images[split].setdefault(class_name, []).append(path)
        if not images:
            scan.skipped[name][f"no images in {folder.name}"] += 1
        elif all(len(parts) > 1 for parts in parts_of.values()):
            scan.subfolders[folder][entry.name] = {parts[1] for parts in parts_of.values()}
    for paths in scan.images[split].values():
        paths.sort()
    _count_loose(folder, scan)


def _class_of(parts: tuple[str, ...], classes_from: ClassesFrom) -> str:
    """Return the class of the images in a folder; `parts` is its path below the folder of the classes.

    Raises:
        ValueError: it has no name that the class file could hold.
    """
    names = [normalize_class_name(part) for part in parts]
    used = {"leaf": names[-1:], "path": names}.get(classes_from, names[:1])
    if "" in used:
        raise ValueError(f"the class folder {'/'.join(parts)!r} has a blank name: rename it")
    return "/".join(used)


def find_images(folder: str | Path, skipped: Counter[str]) -> list[str]:
    """Return the sorted paths of all images below `folder`; count other files by reason in `skipped`.

    Links are followed, but each folder is read once, by its own name if it has one below `folder`, and a link to a
    folder above itself is skipped. No file is opened.
    """
    images: list[str] = []
    visited: set[str] = set()
    folders, links = [str(folder)], []
    while folders or links:
        path = folders.pop() if folders else links.pop(0)
        real = os.path.realpath(path)
        if reason := _loop(path, real, visited):
            skipped[reason] += 1
            continue
        visited.add(real)
        try:
            entries = sorted(os.scandir(path), key=lambda entry: entry.name)
        except PermissionError:
            skipped["a folder that can't be opened"] += 1
            continue
        for entry in entries:
            if is_hidden(entry.name):
                skipped["hidden"] += 1
            elif entry.is_dir(follow_symlinks=False):
                folders.append(entry.path)
            elif entry.is_symlink() and os.path.isdir(entry.path):
                links.append(entry.path)
            elif reason := _skip_reason(entry):
                skipped[reason] += 1
            else:
                images.append(Path(entry.path).as_posix())
    return sorted(images)


def _loop(path: str, real: str, visited: Collection[str]) -> str | None:
    """Return why the folder `path`, a link to `real`, must not be read; None if it may be."""
    parent = os.path.realpath(os.path.dirname(os.path.abspath(path)))
    if os.path.join(parent, "").startswith(os.path.join(real, "")):
        return "a link to a folder above it"
    return "a link to a folder already read" if real in visited else None


def is_hidden(name: str) -> bool:
    """Return whether a file or folder of this name is skipped."""
    return name.startswith(HIDDEN) or name.lower() in SYSTEM_FOLDERS


def _skip_reason(entry: os.DirEntry) -> str | None:
    """Return why `entry` is skipped; None for images."""
    suffix = os.path.splitext(entry.name)[1].lower()
    if "\n" in entry.name or "\r" in entry.name:
        return "with a line break in the name, rename it"
    if suffix in HEIF_SUFFIXES - IMAGE_SUFFIXES:
        return f"needs pip install pillow-heif ({suffix})"
    if suffix not in IMAGE_SUFFIXES:
        return f"not an image ({suffix or 'no suffix'})"
    return None if os.path.isfile(entry.path) else "not a file (a broken link, a pipe)"


def _folders(folder: Path) -> list[Path]:
    return sorted(entry for entry in folder.iterdir() if entry.is_dir() and not is_hidden(entry.name))


def _count_loose(folder: Path, scan: Scan) -> None:
    for entry in folder.iterdir():
        if entry.is_symlink() and not entry.exists() and not entry.name.startswith(HIDDEN):
            scan.skipped[entry.name]["a broken link"] += 1
        elif not entry.is_dir() and entry.suffix.lower() in IMAGE_SUFFIXES:
            scan.skipped[""]["outside the class folders"] += 1
