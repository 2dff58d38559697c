"""What lies in folders of pictures: which of them are splits, which classes, and what is passed over."""

from __future__ import annotations

import os
import unicodedata
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path

from utils.annotation import demo_digits
from utils.data.image_io import HEIF_SUFFIXES, IMAGE_SUFFIXES

HIDDEN = (".", "@eaDir")
"""What the names of hidden files and folders begin with; the second are Synology's, with small copies of pictures."""
SPLITS = ("train", "val", "test")
SPLIT_NAMES = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}


@dataclass
class Scan:
    """What lies in the folders.

    Attributes:
        pictures: split -> class -> paths, sorted; only classes with pictures.
        skipped: class -> why -> how many were passed over; the class "" stands for what lies outside class folders.
        demo_set_aside: whether built-in digits were passed over because there are other pictures.
    """

    pictures: dict[str, dict[str, list[str]]] = field(default_factory=lambda: {split: {} for split in SPLITS})
    skipped: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    demo_set_aside: bool = False

    def count(self, split: str, name: str) -> int:
        """How many pictures a class has in a split."""
        return len(self.pictures[split].get(name, ()))

    def paths(self) -> list[str]:
        """All pictures."""
        return [path for classes in self.pictures.values() for paths in classes.values() for path in paths]


def scan_datasets(root: str | Path) -> Scan:
    """Find the pictures under `<split>/<class>/`, or directly under `<class>/`, at any depth below.

    A folder named like a split (train, val, valid, validation or test, in upper or lower case) counts as one if there
    are folders in it. The built-in digits are passed over where there are other pictures.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: there are folders for other splits and none for training, or no class folders in them.
    """
    root = Path(root)
    if not root.is_dir():
        raise FileNotFoundError(f"there is no folder {root}: make it and put a folder of pictures per class into it")
    folders = _folders(root)
    splits = {entry: SPLIT_NAMES[entry.name.lower()] for entry in folders if _is_split(entry)}
    scan = Scan()
    if not splits and len(folders) > 1 and all(entry.name.lower() in SPLIT_NAMES for entry in folders):
        raise ValueError(f"the folders in {root} hold no class folders: put the pictures of each class into one there")
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
            if pictures := len(pictures_below(entry, Counter())):
                scan.skipped[entry.name]["in a folder beside train, val and test: move it into one of them"] += pictures
        _count_loose(root, scan)
    else:  # class folders; split folders with nothing but the built-in digits in them have made way
        scan_classes(root, scan, "train", besides=set(splits))
        scan.demo_set_aside = bool(splits)
    set_demo_aside(scan)
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
        found = scan.pictures[split].setdefault(name, [])
        found += pictures_below(entry, scan.skipped[name])
        if not found:
            del scan.pictures[split][name]
            scan.skipped[name][f"no pictures in {folder.name}"] += 1
    _count_loose(folder, scan)


def pictures_below(folder: str | Path, skipped: Counter[str]) -> list[str]:
    """The paths of all pictures in `folder` and below, sorted; what is hidden, no picture, or a folder that can't be
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
                elif reason := _no_picture(entry):
                    skipped[reason] += 1
                else:
                    found.append(Path(entry.path).as_posix())
    return sorted(found)


def _no_picture(entry: os.DirEntry) -> str | None:
    """Why `entry` isn't taken for a picture, None if it is."""
    suffix = os.path.splitext(entry.name)[1].lower()
    if "\n" in entry.name or "\r" in entry.name:
        return "with a line break in the name, rename it"
    if suffix in HEIF_SUFFIXES - IMAGE_SUFFIXES:
        return f"needs pip install pillow-heif ({suffix})"
    if suffix not in IMAGE_SUFFIXES:
        return f"not a picture ({suffix or 'no suffix'})"
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
    """Whether a picture is one of the built-in digits."""
    return os.path.basename(path).startswith(demo_digits.PREFIX)


def _holds_only_demo(folder: Path) -> bool:
    return all(map(is_demo, pictures_below(folder, Counter())))


def set_demo_aside(scan: Scan) -> None:
    """Take the built-in digits out of `scan` if there are other pictures."""
    if all(map(is_demo, scan.paths())):
        return
    for classes in scan.pictures.values():
        for name, paths in list(classes.items()):
            own = [path for path in paths if not is_demo(path)]
            if len(own) < len(paths):
                scan.demo_set_aside = True
                scan.skipped[""]["built-in digits"] += len(paths) - len(own)
            if own:
                classes[name] = own
            else:
                del classes[name]
