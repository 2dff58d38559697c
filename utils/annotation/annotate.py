"""Create the lists and the class file from folders of images."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from utils.annotation import demo_digits
from utils.annotation.audit import AuditedImage, Finding, audit_images, grouped_images
from utils.annotation.audit_report import format_findings, write_audit
from utils.annotation.fingerprints import Fingerprints
from utils.annotation.folder_scan import HIDDEN, SPLIT_NAMES, SPLITS, Scan, scan_datasets
from utils.annotation.split import group_by_name, split_validation
from utils.config.train_config import TrainConfig, project_files
from utils.data.image_list import read_classes, read_first_path, write_classes, write_excluded, write_list
from utils.system.text import shorten_list

EXCLUDED = "excluded.txt"


def choose_classes(scan: Scan, classes_path: str | Path) -> list[str]:
    """Return the class names from the class file, or else the sorted folder names.

    Raises:
        ValueError: the class file matches no folder, or fewer than two classes have training images.
    """
    folders = sorted(scan.images["train"])
    path = Path(classes_path)
    if path.is_file():
        names = read_classes(path)
        if set(names) & set(folders):
            return names
        if folders:
            raise ValueError(
                f"{path}: none of its classes ({shorten_list(names)}) is a folder with training images (there are: "
                f"{shorten_list(folders)}); correct it, or delete it to create it from the folders"
            )
    if len(folders) < 2:
        skipped = sum((Counter(reasons) for reasons in scan.skipped.values()), Counter())
        details = "; skipped: " + ", ".join(f"{n} {why}" for why, n in skipped.items()) if skipped else ""
        raise ValueError(
            f"at least two classes are needed, each a folder of images in datasets/train/ or datasets/; folders with "
            f"training images: {shorten_list(folders)}{details}"
        )
    return folders


def annotate(
    datasets_path: str | Path = "datasets",
    classes_path: str | Path = "model_data/cls_classes.txt",
    train_annotation_path: str | Path = "cls_train.txt",
    val_annotation_path: str | Path = "cls_val.txt",
    test_annotation_path: str | Path = "cls_test.txt",
    val_fraction: float = 0.1,
    test_fraction: float = 0.0,
    seed: int = 11,
    group_regex: str = "",
    audit: bool = True,
    fix: bool = False,
    audit_path: str | Path = "audit",
    cache_dir: str | Path = TrainConfig.cache_dir,
    max_pixels: int = TrainConfig.max_pixels,
    allow_truncated: bool = TrainConfig.allow_truncated,
) -> None:
    """Write the lists and, if it is missing, the class file; print image counts, skipped files and audit findings.

    Without a val folder, validation images are held out from the training images; without a test folder, so are test
    images if test_fraction is set. The same folders always give the same lists.

    Args:
        datasets_path: contains train/, val/, test/ with a folder per class in each, or the class folders themselves.
        classes_path: the class file.
        train_annotation_path: the training list.
        val_annotation_path: the validation list.
        test_annotation_path: the test list.
        val_fraction: fraction of each class for validation if there is no val folder, between 0 and 1.
        test_fraction: fraction of each class for testing if there is no test folder; 0: no test list.
        seed: determines which images are held out.
        group_regex: keep images in one split if this expression, or its first group, matches the same text in their
            file names, such as '^(patient\\d+)_'.
        audit: read every image and report problems; results are cached. Also keeps near-duplicates in one split.
        fix: exclude from the lists the images that the audit marks as excluded; no image file is changed.
        audit_path: folder for audit.json, audit.html and, with fix, excluded.txt.
        cache_dir: folder for cached audit results.
        max_pixels: as in train.py: larger images count as unreadable.
        allow_truncated: as in train.py: incomplete files don't count as unreadable.

    Raises:
        FileNotFoundError: there is no folder `datasets_path`.
        ValueError: an argument is invalid, or the folders don't give a training and a validation set.
    """
    if not 0 < val_fraction < 1:
        raise ValueError(f"val_fraction={val_fraction}: give a number above 0 and below 1")
    if not 0 <= test_fraction < 1 - val_fraction:
        raise ValueError(f"test_fraction={test_fraction}: leaves no training images; give 0 or a smaller number")
    if fix and not audit:
        raise ValueError("fix=True: needs audit=True, which finds the images to exclude")
    scan = scan_datasets(datasets_path)
    names = choose_classes(scan, classes_path)
    groups = group_by_name(scan.paths(), group_regex)
    findings = None
    if audit:
        fingerprints = Fingerprints(Path(cache_dir, "fingerprints.sqlite"), max_pixels, allow_truncated)
        findings = audit_scan(scan, names, groups, fingerprints, audit_path)
        groups += grouped_images(findings)
    reasons = exclude(scan, findings or []) if fix else {}
    if not test_fraction:
        check_test_list(scan, test_annotation_path)
    messages = hold_out(scan, {"test": test_fraction, "val": val_fraction}, seed, groups)
    targets = dict(zip(SPLITS, (train_annotation_path, val_annotation_path, test_annotation_path), strict=True))
    written = write_lists(scan, names, classes_path, targets)
    record_excluded(Path(audit_path, EXCLUDED), reasons, fix)
    print(format_table(scan, names))
    if findings is not None:
        print(format_findings(findings, audit_path, fix))
    for message in messages:
        print(message)
    print(f"written: {', '.join(written)}")


def check_test_list(scan: Scan, test_annotation_path: str | Path) -> None:
    """Raise a ValueError if test images held out from train by an earlier run would become training images."""
    first = read_first_path(test_annotation_path)
    if first and not scan.images["test"] and os.path.abspath(first) in map(os.path.abspath, scan.paths()):
        raise ValueError(
            f"test_fraction=0: {test_annotation_path} has images held out from train, which would become training "
            f"images; give the same --test-fraction as before, or delete {test_annotation_path}"
        )


def hold_out(scan: Scan, fractions: dict[str, float], seed: int, groups: Sequence[Sequence[str]]) -> list[str]:
    """Move fractions of the training images to the splits without images; return messages to print.

    Raises:
        ValueError: a fraction is given for the test split, and it has images.
    """
    messages = []
    total, left = sum(map(len, scan.images["train"].values())), 1.0
    for split, fraction in fractions.items():
        if scan.images[split]:
            if split == "test" and fraction:
                raise ValueError(f"test_fraction={fraction}: there is a test folder with images; remove one of the two")
            continue
        if not fraction:
            messages.append(
                "no test folder: eval.py will use the validation images, which also select the best epoch, so its "
                "metrics will be optimistic; python txt_annotation.py --test-fraction 0.2 holds out 20% of train"
            )
            continue
        scan.images[split] = split_validation(scan.images["train"], fraction / left, seed, groups)
        left -= fraction
        count = sum(map(len, scan.images[split].values()))
        part = count / total
        note = "" if 0.5 < part / fraction < 2 else f", not {fraction:.0%}: groups are kept together"
        messages.append(f"no {split} folder with images: {count} ({part:.1%}{note}) were held out from train")
    return messages


def write_lists(scan: Scan, names: list[str], classes_path: str | Path, targets: dict[str, str | Path]) -> list[str]:
    """Write the class file if it differs, and the list of each split with images; return their paths.

    An existing list of a split without images is renamed, since it may be the user's.

    Raises:
        ValueError: there are no training or no validation images; nothing is written.
    """
    entries: dict[str, list[tuple[int, str]]] = {}  # sorted by class id and path
    for split, target in targets.items():
        paths = [(k, path) for k, name in enumerate(names) for path in scan.images[split].get(name, ())]
        entries[split] = [(class_id, _relative(path, target)) for class_id, path in paths]
    for split in ("train", "val"):
        if not entries[split]:
            raise ValueError(
                f"no {split} images: give each class at least two that are neither near-duplicates nor in one group, "
                f"or put images of {shorten_list(names)} in {split}/"
            )
    if not Path(classes_path).is_file() or read_classes(classes_path) != names:
        write_classes(classes_path, names)
    for split, target in targets.items():
        if entries[split]:
            write_list(target, entries[split])
        elif Path(target).is_file():
            old = f"{target}.old"
            print(f"there are no {split} images: {target} was renamed to {old}")
            os.replace(target, old)
    return [str(classes_path), *(str(target) for split, target in targets.items() if entries[split])]


def audit_scan(
    scan: Scan, names: list[str], groups: Sequence[Sequence[str]], fingerprints: Fingerprints, audit_path: str | Path
) -> list[Finding]:
    """Audit every image of the classes `names`, and write the report."""
    placed = [(path, split, name) for split in SPLITS for name in names for path in scan.images[split].get(name, ())]
    prints = fingerprints.read([path for path, *_ in placed])
    images = [AuditedImage(*place, fingerprint) for place, fingerprint in zip(placed, prints, strict=True)]
    findings = audit_images(images, names, groups)
    write_audit(audit_path, findings, images, fingerprints)
    return findings


def exclude(scan: Scan, findings: list[Finding]) -> dict[str, str]:
    """Remove the excluded images of `findings` from `scan`; return path -> kind of finding."""
    reasons: dict[str, str] = {}
    for finding in findings:
        for image in finding.excluded:
            reasons.setdefault(image.path, finding.kind)
    for classes in scan.images.values():
        for name, paths in list(classes.items()):
            classes[name] = [path for path in paths if path not in reasons]
            if len(classes[name]) < len(paths):
                scan.skipped[name][f"excluded, see {EXCLUDED}"] += len(paths) - len(classes[name])
            if not classes[name]:
                del classes[name]
    return reasons


def record_excluded(path: Path, reasons: dict[str, str], fix: bool) -> None:
    """Write `excluded.txt` with `fix`; otherwise delete an earlier one with a warning."""
    if fix:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_excluded(path, reasons)
    elif path.is_file():
        print(f"warning: the previous lists were written with --fix; the images in {path} are included again")
        path.unlink()


def format_table(scan: Scan, names: list[str]) -> str:
    """Return a table of image counts and skipped files per class, followed by warnings."""
    folders = sorted({name for split in SPLITS for name in scan.images[split]} | set(scan.skipped) - {""})
    rows = [("class", *SPLITS, "skipped")]
    for name in [*names, *(name for name in folders if name not in names)]:
        counts = [str(scan.count(split, name)) if name in names else "-" for split in SPLITS]
        reasons = [f"{count} {reason}" for reason, count in sorted(scan.skipped.get(name, Counter()).items())]
        total = sum(scan.count(split, name) for split in SPLITS)
        if name not in names and total:
            in_train = scan.count("train", name)
            why = "not in the class file; delete that file to recreate it" if in_train else "no training images"
            reasons.append(f"{total} images: {why}")
        if name in names or reasons:
            rows.append((name, *counts, ", ".join(reasons)))
    totals = [str(sum(scan.count(split, name) for name in names)) for split in SPLITS]
    outside = ", ".join(f"{count} {reason}" for reason, count in scan.skipped.get("", Counter()).items())
    rows.append(("all", *totals, outside))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *(row[c].rjust(widths[c]) for c in (1, 2, 3)), row[4]]).rstrip()
        for row in rows
    ]
    lines += [
        f"warning: {name} is used as a class, since its folder is next to class folders and directly contains images"
        for name in names
        if name.lower() in SPLIT_NAMES
    ]
    for split in ("train", "val"):
        missing = [name for name in names if not scan.count(split, name)]
        if missing:
            lines.append(
                f"warning: no {split} images of {shorten_list(missing)}; to remove a class, delete the class file"
            )
    return "\n".join(lines)


def ensure_lists(config: TrainConfig, datasets_path: str | Path = "datasets") -> str:
    """Create the lists that `config` lacks at their default places; return the folder of its project.

    Lists in another folder or at other paths belong to the user and are never written. Without lists and images, with
    `config.demo`, the project is the handwritten digits in `demo/`, written if they are missing.

    Raises:
        FileNotFoundError: there are neither lists nor images.
    """
    files, placed = project_files(""), config.with_paths()
    elsewhere = any(getattr(placed, field) != files[field] for field in files if field != "test_annotation_path")
    if elsewhere or Path(placed.train_annotation_path).is_file():
        return config.data
    limits = {"cache_dir": config.cache_dir, "max_pixels": config.max_pixels, "allow_truncated": config.allow_truncated}
    root = Path(datasets_path)
    if root.is_dir() and any(e.name != "README.md" and not e.name.startswith(HIDDEN) for e in root.iterdir()):
        print(f"creating lists of the images in {root}/")
        annotate(root, **files, **limits)
        return ""
    if not config.demo:
        raise FileNotFoundError(
            f"there are no lists (cls_train.txt, ...) and no images in {root}/ of the working folder {os.getcwd()}: "
            f"put one folder of images per class into {root}/, or give the folder of the lists with --data; --demo "
            f"trains on handwritten digits"
        )
    print(f"there are no images in {root}/: training on handwritten digits, in {demo_digits.FOLDER}/")
    print("  for your own images, put one folder per class there, see README.md")
    files = project_files(demo_digits.FOLDER)
    if not Path(files["train_annotation_path"]).is_file():
        demo_digits.write_demo(demo_digits.FOLDER)
        annotate(demo_digits.FOLDER, **files, audit=False)
    return demo_digits.FOLDER


def _relative(path: str, list_path: str | Path) -> str:
    """Return `path` relative to the folder of `list_path`; absolute paths are unchanged."""
    if os.path.isabs(path):
        return path
    try:
        return Path(os.path.relpath(path, Path(list_path).parent)).as_posix()
    except ValueError:  # on Windows the list may be on another drive
        return Path(os.path.abspath(path)).as_posix()
