"""Find images in split and class folders."""

from __future__ import annotations

import os
import unicodedata
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path

from utils.data.image_io import HEIF_SUFFIXES, IMAGE_SUFFIXES

HIDDEN = "."
"""Prefix of hidden files and folders."""
SPLITS = ("train", "val", "test")
SPLIT_NAMES = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}


@dataclass
class Scan:
    """The images found, and the skipped files.

    Attributes:
        images: split -> class -> sorted paths; only classes with images.
        skipped: class -> reason -> number of files; class "": files outside class folders.
    """

    images: dict[str, dict[str, list[str]]] = field(default_factory=lambda: {split: {} for split in SPLITS})
    skipped: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))

    def count(self, split: str, name: str) -> int:
        """Return the number of images of a class in a split."""
        return len(self.images[split].get(name, ()))

    def paths(self) -> list[str]:
        """Return the paths of all images."""
        return [path for classes in self.images.values() for paths in classes.values() for path in paths]


def scan_datasets(root: str | Path) -> Scan:
    """Find images at any depth under `<split>/<class>/`, or under `<class>/`.

    A split is a folder named train, val, valid, validation or test, in any case, that contains folders.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: the train folder is missing beside other splits, or the splits contain no class folders.
    """
    root = Path(root)
    if not root.is_dir():
        raise FileNotFoundError(f"there is no folder {root}: create it with one folder of images per class")
    folders = _folders(root)
    splits = {entry: SPLIT_NAMES[entry.name.lower()] for entry in folders if _is_split(entry)}
    scan = Scan()
    if not splits and len(folders) > 1 and all(entry.name.lower() in SPLIT_NAMES for entry in folders):
        raise ValueError(f"{root}: its split folders contain no class folders; put the images of each class in one")
    if splits and "train" not in splits.values():
        raise ValueError(f"{root}: it has {next(iter(splits)).name}/ but no train/; put class folders in train/")
    others = [entry for entry in folders if entry not in splits]
    if splits:
        for entry, split in splits.items():
            scan_classes(entry, scan, split)
        for entry in others:
            if images := len(find_images(entry, Counter())):
                scan.skipped[entry.name]["in a folder beside train, val and test, move it into one of them"] += images
        _count_loose(root, scan)
    else:
        scan_classes(root, scan, "train")
    return scan


def scan_classes(folder: Path, scan: Scan, split: str) -> None:
    """Add the images in the class folders of `folder` to `scan`.

    Class names are normalized to Unicode NFC: macOS decomposes accents and Hangul in file names.
    """
    for entry in _folders(folder):
        name = unicodedata.normalize("NFC", entry.name)
        images = scan.images[split].setdefault(name, [])
        images += find_images(entry, scan.skipped[name])
        if not images:
            del scan.images[split][name]
            scan.skipped[name][f"no images in {folder.name}"] += 1
    _count_loose(folder, scan)


def find_images(folder: str | Path, skipped: Counter[str]) -> list[str]:
    """Return the sorted paths of all images below `folder`; count other files by reason in `skipped`.

    Links to files are followed; links to folders are not, since they could form loops. No file is opened.
    """
    images = []
    folders = [str(folder)]
    while folders:
        try:
            entries = os.scandir(folders.pop())
        except PermissionError:
            skipped["a folder that can't be opened"] += 1
            continue
        with entries:
            for entry in entries:
                if entry.name.startswith(HIDDEN):
                    skipped["hidden"] += 1
                elif entry.is_dir(follow_symlinks=False):
                    folders.append(entry.path)
                elif reason := _skip_reason(entry):
                    skipped[reason] += 1
                else:
                    images.append(Path(entry.path).as_posix())
    return sorted(images)


def _skip_reason(entry: os.DirEntry) -> str | None:
    """Return why `entry` is skipped; None for images."""
    suffix = os.path.splitext(entry.name)[1].lower()
    if "\n" in entry.name or "\r" in entry.name:
        return "with a line break in the name, rename it"
    if suffix in HEIF_SUFFIXES - IMAGE_SUFFIXES:
        return f"needs pip install pillow-heif ({suffix})"
    if suffix not in IMAGE_SUFFIXES:
        return f"not an image ({suffix or 'no suffix'})"
    return None if os.path.isfile(entry.path) else "not a file (a broken link, a link to a folder, a pipe)"


def _folders(folder: Path) -> list[Path]:
    return sorted(entry for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith(HIDDEN))


def _is_split(folder: Path) -> bool:
    return folder.name.lower() in SPLIT_NAMES and bool(_folders(folder))


def _count_loose(folder: Path, scan: Scan) -> None:
    for entry in folder.iterdir():
        if entry.is_symlink() and not entry.exists() and not entry.name.startswith(HIDDEN):
            scan.skipped[entry.name]["a broken link"] += 1
        elif not entry.is_dir() and entry.suffix.lower() in IMAGE_SUFFIXES:
            scan.skipped[""]["outside the class folders"] += 1
