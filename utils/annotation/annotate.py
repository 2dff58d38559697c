"""Folders of images, one per class, become lists and a class file."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from utils.annotation import demo_digits
from utils.annotation.audit import AuditedImage, Finding, find_faults, linked
from utils.annotation.audit_report import format_findings, write_audit
from utils.annotation.fingerprints import Fingerprints
from utils.annotation.folder_scan import HIDDEN, SPLIT_NAMES, SPLITS, Scan, is_demo, scan_datasets
from utils.annotation.split import group_by_name, split_validation
from utils.config.train_config import TrainConfig
from utils.data.image_list import read_classes, read_first_path, write_classes, write_excluded, write_list

EXCLUDED = "excluded.txt"


def choose_classes(scan: Scan, classes_path: str | Path) -> list[str]:
    """The class names: those in the class file if there is one, else the folders, sorted.

    A class file of the built-in digits doesn't count once these have given way to other images.

    Raises:
        ValueError: too few classes have training images.
    """
    found = sorted(scan.images["train"])
    path = Path(classes_path)
    if path.is_file():
        names = read_classes(path)
        of_demo = names == list(demo_digits.CLASSES)
        if set(names) & set(found) and not (of_demo and scan.demo_excluded):
            return names
        if found and not of_demo:
            raise ValueError(
                f"{path} names {_some(names)}, and none of them is a folder with training images "
                f"(found: {_some(found)}): correct it, or delete it to have it written from the folders"
            )
    if len(found) < 2:
        skipped = sum((Counter(reasons) for reasons in scan.skipped.values()), Counter())
        told = "; passed over: " + ", ".join(f"{n} {why}" for why, n in skipped.items()) if skipped else ""
        raise ValueError(
            f"two classes at least are needed, each a folder of images in datasets/train/ or datasets/; folders with "
            f"training images: {_some(found)}{told}"
        )
    return found


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
    """Write the lists and, where there is none, the class file; print a table of what went where and what was skipped,
    and what is wrong with the images.

    The validation list comes from the val folder, else out of the training images; the test list from the test
    folder, else out of the training images if you say which part. The same folders give the same bytes.

    Args:
        datasets_path: holds train/, val/, test/ with a folder per class in each, or the class folders themselves.
        classes_path: the class file.
        train_annotation_path: where the training list goes.
        val_annotation_path: where the validation list goes.
        test_annotation_path: where the test list goes.
        val_fraction: the part of each class that is taken for validation, above 0 and below 1.
        test_fraction: the part of each class that is taken for testing where there is no test folder; 0: none.
        seed: another seed takes other images for validation and testing.
        group_regex: images whose file names have the same part matched by this stay on one side when such a set is
            taken, such as '^(patient\\d+)_'; its first group counts, if it has one.
        audit: read every image and look for what is wrong; what was read is remembered, so that only new ones are
            read the next time. Images that look alike then stay on one side, too, but for those that do by
            nature.
        fix: leave the images that the audit names as left out out of the lists; the files stay as they are.
        audit_path: folder that gets audit.json, audit.html and, with fix, excluded.txt.
        cache_dir: where what was read is remembered.
        max_pixels: as in train.py: larger images count as unreadable.
        allow_truncated: as in train.py: files that end too early don't count as unreadable.

    Raises:
        FileNotFoundError: there is no folder `datasets_path`.
        ValueError: the folders or the class file can't make a training and a validation set; the message says why.
    """
    if not 0 < val_fraction < 1:
        raise ValueError(f"val_fraction={val_fraction}: give a number above 0 and below 1")
    if not 0 <= test_fraction < 1 - val_fraction:
        raise ValueError(f"test_fraction={test_fraction}: give 0, or a number that leaves a part to train on")
    if fix and not audit:
        raise ValueError("fix=True, audit=False: what is faulty is found by the audit; leave it on")
    scan = scan_datasets(datasets_path)
    names = choose_classes(scan, classes_path)
    groups = group_by_name(scan.paths(), group_regex)
    findings = None
    if audit and not all(map(is_demo, scan.paths())):
        fingerprints = Fingerprints(Path(cache_dir, "fingerprints.sqlite"), max_pixels, allow_truncated)
        findings = audit_scan(scan, names, groups, fingerprints, audit_path)
        groups += linked(findings)
    reasons = exclude(scan, findings or []) if fix else {}
    if not test_fraction:
        check_test_list(scan, test_annotation_path)
    taken = take_out(scan, {"test": test_fraction, "val": val_fraction}, seed, groups)
    targets = dict(zip(SPLITS, (train_annotation_path, val_annotation_path, test_annotation_path), strict=True))
    written = write_lists(scan, names, classes_path, targets)
    record_excluded(Path(audit_path, EXCLUDED), reasons, fix)
    print(format_table(scan, names))
    if findings is not None:
        print(format_findings(findings, audit_path, fix))
    for line in taken:
        print(line)
    print(f"written: {', '.join(written)}")


def check_test_list(scan: Scan, test_annotation_path: str | Path) -> None:
    """Raise a ValueError if images to test on, taken out of train before, would be trained on again."""
    first = read_first_path(test_annotation_path)
    if first and not scan.images["test"] and os.path.abspath(first) in map(os.path.abspath, scan.paths()):
        raise ValueError(
            f"test_fraction=0: {test_annotation_path} holds images that were taken out of train, which would be "
            f"trained on again; give --test-fraction as before, or delete {test_annotation_path} if you mean it"
        )


def take_out(scan: Scan, fractions: dict[str, float], seed: int, groups: Sequence[Sequence[str]]) -> list[str]:
    """Take such parts of the training images for the splits that have no images; return what there is to say.

    Raises:
        ValueError: there is a test folder, and a part for testing was asked for.
    """
    told = []
    whole, left = sum(map(len, scan.images["train"].values())), 1.0
    for split, fraction in fractions.items():
        if scan.images[split]:
            if split == "test" and fraction:
                raise ValueError(f"test_fraction={fraction}: there are test images already; leave it out")
            continue
        if not fraction:
            told.append(
                "no test folder: eval.py will go by the validation images, which choose the best epoch, so that its "
                "figures flatter; python txt_annotation.py --test-fraction 0.2 takes a fifth of train out for testing"
            )
            continue
        scan.images[split] = split_validation(scan.images["train"], fraction / left, seed, groups)
        left -= fraction
        count = sum(map(len, scan.images[split].values()))
        part = count / whole
        together = "" if 0.5 < part / fraction < 2 else f", not {fraction:.0%}: groups stay together"
        told.append(f"no {split} folder with images: {count} ({part:.1%}{together}) were taken out of train instead")
    return told


def write_lists(scan: Scan, names: list[str], classes_path: str | Path, targets: dict[str, str | Path]) -> list[str]:
    """Write the class file, unless it is right already, and a list for each split that has images; return the paths.

    A list of a split that has none, which may be of other images, is renamed.

    Raises:
        ValueError: there are no images to train or to validate on; nothing is written then.
    """
    entries = {split: _entries(scan.images[split], names, target) for split, target in targets.items()}
    for split, purpose in (("train", "train"), ("val", "validate")):
        if not entries[split]:
            raise ValueError(
                f"no images to {purpose} on: give each class two at least that neither look alike nor belong to one "
                f"group, or put some of {_some(names)} in {split}"
            )
    if not Path(classes_path).is_file() or read_classes(classes_path) != names:
        write_classes(classes_path, names)
    for split, target in targets.items():
        if entries[split]:
            write_list(target, entries[split])
        elif Path(target).is_file():
            old = f"{target}.old"
            print(f"there are no {split} images: {target} is called {old} from now on")
            os.replace(target, old)
    return [str(classes_path), *(str(target) for split, target in targets.items() if entries[split])]


def audit_scan(
    scan: Scan, names: list[str], groups: Sequence[Sequence[str]], fingerprints: Fingerprints, audit_path: str | Path
) -> list[Finding]:
    """Look at every image of the classes `names`, and write what is wrong with them."""
    placed = [(path, split, name) for split in SPLITS for name in names for path in scan.images[split].get(name, ())]
    read = fingerprints.read([path for path, *_ in placed])
    images = [AuditedImage(*place, fingerprint) for place, fingerprint in zip(placed, read, strict=True)]
    findings = find_faults(images, names, groups)
    write_audit(audit_path, findings, images, fingerprints)
    return findings


def exclude(scan: Scan, findings: list[Finding]) -> dict[str, str]:
    """Take out of `scan` what `findings` would leave out; return the kind of fault of each path."""
    reasons: dict[str, str] = {}
    for finding in findings:
        for image in finding.excluded:
            reasons.setdefault(image.path, finding.kind)
    for classes in scan.images.values():
        for name, paths in list(classes.items()):
            classes[name] = [path for path in paths if path not in reasons]
            if len(classes[name]) < len(paths):
                scan.skipped[name][f"left out, see {EXCLUDED}"] += len(paths) - len(classes[name])
            if not classes[name]:
                del classes[name]
    return reasons


def record_excluded(path: Path, reasons: dict[str, str], fix: bool) -> None:
    """Write `excluded.txt` beside lists that were made with `fix`, else delete that of earlier ones, and say so."""
    if fix:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_excluded(path, reasons)
    elif path.is_file():
        print(f"warning: the lists before this were made with --fix; what {path} names is in them again")
        path.unlink()


def format_table(scan: Scan, names: list[str]) -> str:
    """A row a class: images in each split, and what was skipped and why; then what needs attention."""
    everywhere = sorted({name for split in SPLITS for name in scan.images[split]} | set(scan.skipped) - {""})
    rows = [("class", *SPLITS, "skipped")]
    for name in [*names, *(name for name in everywhere if name not in names)]:
        counts = [str(scan.count(split, name)) if name in names else "-" for split in SPLITS]
        reasons = [f"{count} {reason}" for reason, count in sorted(scan.skipped.get(name, Counter()).items())]
        excluded = sum(scan.count(split, name) for split in SPLITS)
        if name not in names and excluded:
            in_train = scan.count("train", name)
            why = "not in the class file, delete that to have it made anew" if in_train else "no training images"
            reasons.append(f"{excluded} images: {why}")
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
        f"warning: {name} is taken for a class: there are images in a folder of that name where classes stand"
        for name in names
        if name.lower() in SPLIT_NAMES
    ]
    for split in ("train", "val"):
        absent = [name for name in names if not scan.count(split, name)]
        if absent:
            lines.append(
                f"warning: no {split} images of {_some(absent)}; if a class is gone, delete the class file and run "
                f"this again"
            )
    return "\n".join(lines)


def ensure_lists(config: TrainConfig, datasets_path: str | Path = "datasets") -> None:
    """Make the lists that `config` names, where training would otherwise fail or use the wrong images.

    Without a training list the folders are annotated; with nothing in them the built-in digits are written first.
    Lists of the built-in digits give way as soon as there are other images. Lists elsewhere than at their default
    places are the user's, and left alone.
    """
    fields = ("train_annotation_path", "val_annotation_path")
    if any(getattr(config, field) != getattr(TrainConfig, field) for field in fields):
        return
    lists_are_demo = is_demo(read_first_path(config.train_annotation_path) or "")
    if Path(config.train_annotation_path).is_file() and not lists_are_demo:
        return
    root = Path(datasets_path)
    root.mkdir(exist_ok=True)
    if not any(entry for entry in root.iterdir() if entry.name != "README.md" and not entry.name.startswith(HIDDEN)):
        print(f"nothing in {root}/: writing the built-in set, handwritten digits, there")
        print("  for your own images put a folder per class there, see README.md")
        demo_digits.write_demo(root)
    elif lists_are_demo and all(map(is_demo, scan_datasets(root).paths())):
        return
    else:
        print(f"the lists are made from the images in {root}/")
    annotate(
        root,
        config.classes_path,
        cache_dir=config.cache_dir,
        max_pixels=config.max_pixels,
        allow_truncated=config.allow_truncated,
    )


def _entries(images: dict[str, list[str]], names: list[str], list_path: str | Path) -> list[tuple[int, str]]:
    """The lines of the list at `list_path`, by class id and then by path."""
    return [
        (class_id, _relative(path, list_path)) for class_id, name in enumerate(names) for path in images.get(name, ())
    ]


def _relative(path: str, list_path: str | Path) -> str:
    """`path` as a list at `list_path` holds it: an absolute one as it is, else relative to the list's folder."""
    if os.path.isabs(path):
        return path
    try:
        return Path(os.path.relpath(path, Path(list_path).parent)).as_posix()
    except ValueError:  # on Windows the list may be on another drive
        return Path(os.path.abspath(path)).as_posix()


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:5]) or "none"
    return shown if len(names) <= 5 else f"{shown} and {len(names) - 5} more"
