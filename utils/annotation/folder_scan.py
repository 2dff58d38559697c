"""What lies in folders of images: which of them are splits, which classes, and what is passed over."""

from __future__ import annotations

import os
import unicodedata
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path

from utils.annotation import demo_digits
from utils.data.image_io import HEIF_SUFFIXES, IMAGE_SUFFIXES

HIDDEN = (".", "@eaDir")
"""What the names of hidden files and folders begin with; the second are Synology's, with small copies of images."""
SPLITS = ("train", "val", "test")
SPLIT_NAMES = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}


@dataclass
class Scan:
    """What lies in the folders.

    Attributes:
        images: split -> class -> paths, sorted; only classes with images.
        skipped: class -> why -> how many were passed over; the class "" stands for what lies outside class folders.
        demo_excluded: whether built-in digits were passed over because there are other images.
    """

    images: dict[str, dict[str, list[str]]] = field(default_factory=lambda: {split: {} for split in SPLITS})
    skipped: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    demo_excluded: bool = False

    def count(self, split: str, name: str) -> int:
        """How many images a class has in a split."""
        return len(self.images[split].get(name, ()))

    def paths(self) -> list[str]:
        """All images."""
        return [path for classes in self.images.values() for paths in classes.values() for path in paths]


def scan_datasets(root: str | Path) -> Scan:
    """Find the images under `<split>/<class>/`, or directly under `<class>/`, at any depth below.

    A folder named like a split (train, val, valid, validation or test, in upper or lower case) counts as one if there
    are folders in it. The built-in digits are passed over where there are other images.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: there are folders for other splits and none for training, or no class folders in them.
    """
    root = Path(root)
    if not root.is_dir():
        raise FileNotFoundError(f"there is no folder {root}: make it and put a folder of images per class into it")
    folders = _folders(root)
    splits = {entry: SPLIT_NAMES[entry.name.lower()] for entry in folders if _is_split(entry)}
    scan = Scan()
    if not splits and len(folders) > 1 and all(entry.name.lower() in SPLIT_NAMES for entry in folders):
        raise ValueError(f"the folders in {root} hold no class folders: put the images of each class into one there")
    if splits and "train" not in splits.values():
        raise ValueError(
            f"{root} has a folder {next(iter(splits)).name} and none named train: put the classes to train on into one"
        )
    others = [entry for entry in folders if entry not in splits]
    # Folders beside the splits, mostly none, are asked first: that spares walking all of train twice.
    beside = bool(splits) and any(not _holds_only_demo(entry) for entry in others)
    made_way = beside and all(map(_holds_only_demo, splits))
    if splits and not made_way:
        for entry, split in splits.items():
            scan_classes(entry, scan, split)
        for entry in others:
            if images := len(find_images(entry, Counter())):
                scan.skipped[entry.name]["in a folder beside train, val and test: move it into one of them"] += images
        _count_loose(root, scan)
    else:  # class folders; split folders with nothing but the built-in digits in them have made way
        scan_classes(root, scan, "train", besides=set(splits))
        scan.demo_excluded = bool(splits)
    exclude_demo(scan)
    return scan


def scan_classes(folder: Path, scan: Scan, split: str, besides: frozenset[Path] | set[Path] = frozenset()) -> None:
    """Add to `scan` what lies in `folder`, whose folders, but for those in `besides`, are named after classes.

    A name's letters count as composed: macOS takes accents and Hangul apart in the names of files, and such folders
    look like those of other systems, and mean the same class.
    """
    for entry in _folders(folder):
        if entry in besides:
            continue
        name = unicodedata.normalize("NFC", entry.name)
        found = scan.images[split].setdefault(name, [])
        found += find_images(entry, scan.skipped[name])
        if not found:
            del scan.images[split][name]
            scan.skipped[name][f"no images in {folder.name}"] += 1
    _count_loose(folder, scan)


def find_images(folder: str | Path, skipped: Counter[str]) -> list[str]:
    """The paths of all images in `folder` and below, sorted; what is hidden, no image, or a folder that can't be
    opened is counted in `skipped`.

    Links to files are followed, links to folders are not, so that no loop is run through. No file is opened.
    """
    found = []
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
                elif reason := _why_no_image(entry):
                    skipped[reason] += 1
                else:
                    found.append(Path(entry.path).as_posix())
    return sorted(found)


def _why_no_image(entry: os.DirEntry) -> str | None:
    """Why `entry` isn't taken for an image, None if it is."""
    suffix = os.path.splitext(entry.name)[1].lower()
    if "\n" in entry.name or "\r" in entry.name:
        return "with a line break in the name, rename it"
    if suffix in HEIF_SUFFIXES - IMAGE_SUFFIXES:
        return f"needs pip install pillow-heif ({suffix})"
    if suffix not in IMAGE_SUFFIXES:
        return f"not an image ({suffix or 'no suffix'})"
    return None if os.path.isfile(entry.path) else "no file (a broken link, a link to a folder, a pipe)"


def _folders(folder: Path) -> list[Path]:
    return sorted(entry for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith(HIDDEN))


def _is_split(folder: Path) -> bool:
    return folder.name.lower() in SPLIT_NAMES and bool(_folders(folder))


def _count_loose(folder: Path, scan: Scan) -> None:
    for entry in folder.iterdir():
        if entry.is_symlink() and not entry.exists() and not entry.name.startswith(HIDDEN):
            scan.skipped[entry.name]["a link to nowhere"] += 1
        elif not entry.is_dir() and entry.suffix.lower() in IMAGE_SUFFIXES:
            scan.skipped[""]["outside the class folders"] += 1


def is_demo(path: str) -> bool:
    """Whether an image is one of the built-in digits."""
    return os.path.basename(path).startswith(demo_digits.PREFIX)


def _holds_only_demo(folder: Path) -> bool:
    return all(map(is_demo, find_images(folder, Counter())))


def exclude_demo(scan: Scan) -> None:
    """Take the built-in digits out of `scan` if there are other images."""
    if all(map(is_demo, scan.paths())):
        return
    for classes in scan.images.values():
        for name, paths in list(classes.items()):
            own = [path for path in paths if not is_demo(path)]
            if len(own) < len(paths):
                scan.demo_excluded = True
                scan.skipped[""]["built-in digits"] += len(paths) - len(own)
            if own:
                classes[name] = own
            else:
                del classes[name]
