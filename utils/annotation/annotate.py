"""Create the lists and the class file from folders of images."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np

from utils.annotation import demo_digits
from utils.annotation.audit import Finding, audit_counts, audit_images, grouped_images
from utils.annotation.audit_report import format_findings, write_audit, write_samples
from utils.annotation.audited_images import AuditedImage, AuditedImages
from utils.annotation.classes import ClassFile, Repeat, check_nesting, choose_classes, nesting_notes, remove_unused
from utils.annotation.fingerprint_table import FingerprintTable
from utils.annotation.fingerprints import Fingerprints
from utils.annotation.folder_scan import SPLITS, ClassesFrom, Scan, is_hidden, scan_datasets
from utils.annotation.scan_report import format_table, list_warnings
from utils.annotation.split import group_by_name, split_validation
from utils.config.train_config import TrainConfig, project_files
from utils.data.image_list import read_classes, read_first_path, write_classes, write_excluded, write_list
from utils.system import cli
from utils.system.files import make_folder, try_unlink
from utils.system.part import Part
from utils.system.text import count_of, shorten_list

FILES = project_files("")
AUDIT, EXCLUDED = "audit", "excluded.txt"


def annotate(
    datasets_path: str | Path = "datasets",
    classes_path: str | Path = FILES["classes_path"],
    train_annotation_path: str | Path = FILES["train_annotation_path"],
    val_annotation_path: str | Path = FILES["val_annotation_path"],
    test_annotation_path: str | Path = FILES["test_annotation_path"],
    out: str | Path = "",
    classes_from: Literal["auto"] | ClassesFrom = "auto",
    class_file: ClassFile = "keep",
    val_fraction: float = 0.1,
    test_fraction: float = 0.0,
    seed: int = 11,
    group_regex: str = "",
    audit: bool = True,
    deep: bool | str = False,
    fix: bool = False,
    show: bool = False,
    part: str = "",
    audit_path: str | Path = AUDIT,
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
        out: a folder for all files, for a project of its own: the three lists, cls_classes.txt and audit/.
        classes_from: which folder names the class: the top one, the one that contains the image (leaf), or all of them
            (path: fruit/apple); auto: top, but an error if the top folders look like splits.
        class_file: an existing class file: keep it, add the new folders at its end, or rewrite it from the folders,
            which changes class ids.
        val_fraction: fraction of each class for validation if there is no val folder, between 0 and 1.
        test_fraction: fraction of each class for testing if there is no test folder; 0: no test list.
        seed: determines which images are held out.
        group_regex: keep images in one split if this expression, or its first group, matches the same text in their
            file names, such as '^(patient\\d+)_'.
        audit: read every image and report problems; results are cached. Also keeps near-duplicates in one split.
        deep: also report images unlike their class and likely wrong labels, found with a pretrained ViT: a file of
            weights, or a name such as vit_s_14, whose weights are downloaded unless they are in model_data/. Without a
            value: weights of DINOv2 in model_data/, else the bundled network, which knows only small images. For
            photos use DINOv2. These images are only listed, never excluded.
        fix: exclude from the lists the images that the audit marks as excluded; no image file is changed.
        show: write only samples.html, with class counts and samples of each class; no audit, no lists.
        part: only read the images of one part, such as 3/16, into cache_dir, and write nothing else; then the same
            command without it, on one machine, reads what is missing and writes all.
        audit_path: folder for audit.json, audit.html, samples.html and, with fix, excluded.txt.
        cache_dir: folder for cached audit results.
        max_pixels: as in train.py: larger images count as unreadable.
        allow_truncated: as in train.py: incomplete files don't count as unreadable.

    Raises:
        FileNotFoundError: there is no folder `datasets_path`.
        ValueError: an argument is invalid, or the folders don't give a training and a validation set.
    """
    repeat = partial(cli.format_command, "txt_annotation.py", annotate, dict(locals()))
    check_arguments(val_fraction, test_fraction, audit, fix, deep)
    chosen = check_part(part, audit, show) if part else None
    lists = (train_annotation_path, val_annotation_path, test_annotation_path)
    classes_path, *lists, audit_path = place_files(str(out), (classes_path, *lists, audit_path))
    scan = scan_datasets(datasets_path, "top" if classes_from == "auto" else classes_from, ignore=[audit_path])
    if classes_from == "auto":
        check_nesting(scan, classes_path, repeat)
    names = choose_classes(scan, classes_path, class_file, repeat)
    remove_unused(scan, names)
    cache = partial(Fingerprints, Path(cache_dir, "fingerprints.sqlite"), max_pixels, allow_truncated)
    if show:
        print(f"written: {write_samples(audit_path, place_images(scan, names), cache())}")
        return
    check_test_images(scan, lists[-1], test_fraction)
    if chosen:
        print(read_part(place_images(scan, names).paths, chosen, cache(part=chosen), repeat))
        return
    notes = nesting_notes(scan, classes_from, repeat)
    groups = group_by_name(scan.paths(), group_regex)
    findings, reasons = [], {}
    if audit:
        fingerprints = cache()
        fingerprints.merge_parts()
        images = place_images(scan, names)
        images = replace(images, prints=fingerprints.read(images.paths))
        findings = audit_images(images, groups)
        groups += grouped_images(findings)
        if deep:
            findings += audit_deep(images, deep, cache_dir, max_pixels, allow_truncated)
    if fix:
        reasons = exclude(scan, findings)
    notes = [*hold_out(scan, {"test": test_fraction, "val": val_fraction}, seed, groups, repeat), *notes]
    if audit:
        images, findings = update_splits(scan, images, findings)
        findings += audit_counts({split: {name: scan.count(split, name) for name in names} for split in SPLITS}, names)
        write_audit(audit_path, findings, images, fingerprints, fix)
    written = write_lists(scan, names, classes_path, dict(zip(SPLITS, lists, strict=True)))
    record_excluded(Path(audit_path, EXCLUDED), reasons, fix)
    print(format_table(scan, names))
    if audit:
        print(format_findings(findings, audit_path, fix))
    notes.append(f"written: {', '.join(written)}")
    if out:
        notes.append(f"to train on it: {cli.command('python', cli.script_path('train.py'), '--data', str(out))}")
    print(*notes, *list_warnings(scan, names, classes_path, repeat), sep="\n")


def check_arguments(val_fraction: float, test_fraction: float, audit: bool, fix: bool, deep: bool | str) -> None:
    """Raise a ValueError for an invalid argument of `annotate`."""
    if not 0 < val_fraction < 1:
        raise ValueError(f"val_fraction={val_fraction}: give a number above 0 and below 1")
    if not 0 <= test_fraction < 1 - val_fraction:
        raise ValueError(f"test_fraction={test_fraction}: leaves no training images; give 0 or a smaller number")
    if fix and not audit:
        raise ValueError("fix=True: needs audit=True, which finds the images to exclude")
    if deep and not audit:
        raise ValueError(f"deep={deep!r}: needs audit=True, of which it is a part")


def check_part(part: str, audit: bool, show: bool) -> Part:
    """Return the part that `annotate` reads.

    Raises:
        ValueError: it isn't one, or there is nothing to read in parts.
    """
    if not audit or show:
        other = "--show" if show else "--no-audit"
        raise ValueError(f"part={part!r}: only the audit is done in parts; leave out {other}")
    return Part.parse(part)


def place_files(out: str, paths: Sequence[str | Path]) -> Sequence[str | Path]:
    """Return where the class file, the lists and the audit are written: in the folder `out`, or at `paths` without it.

    Raises:
        ValueError: `out` is a file, or one of `paths` isn't the default.
    """
    if not out:
        return paths
    cli.check_folder("out", out)
    if list(map(str, paths)) != [*FILES.values(), AUDIT]:
        raise ValueError(f"out={out!r}: can't be combined with other paths to write to; leave them out")
    return [*project_files(out).values(), Path(out, AUDIT)]


def check_test_images(scan: Scan, test_list: str | Path, test_fraction: float) -> None:
    """Raise a ValueError if test images would be held out although there is a test folder, or if those that an earlier
    run held out from train would become training images."""
    if test_fraction and scan.images["test"]:
        raise ValueError(f"test_fraction={test_fraction}: there is a test folder with images; remove one of the two")
    first = read_first_path(test_list)
    unknown = not test_fraction and first and not scan.images["test"]
    if unknown and os.path.abspath(first) in map(os.path.abspath, scan.paths()):
        raise ValueError(
            f"test_fraction=0: {test_list} has images held out from train, which would become training images; give "
            f"the same --test-fraction as before, or delete {test_list}"
        )


def hold_out(
    scan: Scan, fractions: dict[str, float], seed: int, groups: Sequence[Sequence[str]], repeat: Repeat
) -> list[str]:
    """Move fractions of the training images to the splits without images; return messages to print."""
    messages = []
    total, left = sum(map(len, scan.images["train"].values())), 1.0
    for split, fraction in fractions.items():
        if scan.images[split]:
            continue
        if not fraction:
            messages.append(
                f"no test folder: eval.py will use the validation images, which also select the best epoch, so its "
                f"metrics will be optimistic; {repeat(test_fraction=0.2)} holds out 20% of train"
            )
            continue
        scan.images[split] = split_validation(scan.images["train"], fraction / left, seed, groups)
        left -= fraction
        count = sum(map(len, scan.images[split].values()))
        part = count / total
        note = "" if 0.5 < part / fraction < 2 else f", not {fraction:.0%}: groups are kept together"
        messages.append(
            f"no {split} folder with images: {count_of(count, 'image')} ({part:.1%}{note}) held out from train"
        )
    return messages


def write_lists(scan: Scan, names: list[str], classes_path: str | Path, targets: dict[str, str | Path]) -> list[str]:
    """Write the class file if it differs, and the list of each split with images; return the paths of what was written.

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
    written = []
    if not Path(classes_path).is_file() or read_classes(classes_path) != names:
        write_classes(classes_path, names)
        written.append(str(classes_path))
    for split, target in targets.items():
        if entries[split]:
            write_list(target, entries[split])
            written.append(str(target))
        elif Path(target).is_file():
            old = f"{target}.old"
            print(f"there are no {split} images: {target} was renamed to {old}")
            os.replace(target, old)
    return written


def place_images(scan: Scan, names: list[str]) -> AuditedImages:
    """Return the images of the classes `names`, not yet read."""
    paths: list[str] = []
    counts = np.zeros((len(SPLITS), len(names)), np.int64)
    for split in SPLITS:
        for k, name in enumerate(names):
            paths += scan.images[split].get(name, ())
            counts[SPLITS.index(split), k] = scan.count(split, name)
    splits = np.repeat(np.arange(len(SPLITS), dtype=np.uint8), counts.sum(axis=1))
    class_ids = np.repeat(np.tile(np.arange(len(names), dtype=np.int32), len(SPLITS)), counts.ravel())
    return AuditedImages(paths, splits, class_ids, names, FingerprintTable(len(paths)))


def read_part(paths: Sequence[str], part: Part, fingerprints: Fingerprints, repeat: Repeat) -> str:
    """Read the part's share of `paths`, the images of all parts in their order; return a message to print."""
    share = part.of(paths)
    errors = len(fingerprints.read(share).errors)
    unreadable = f", {errors} of them unreadable" if errors else ""
    return (
        f"part {part}: {len(share)} of {count_of(len(paths), 'image')} read{unreadable}: {fingerprints.path}\n"
        f"when all parts are done: {repeat(part='')}"
    )


def audit_deep(
    images: AuditedImages, deep: bool | str, cache_dir: str | Path, max_pixels: int, allow_truncated: bool
) -> list[Finding]:
    """Return what a pretrained network finds in images of all splits; `deep` names it, see `choose_backbone`."""
    from utils.annotation.embeddings import choose_backbone  # slow: imports torch
    from utils.annotation.outliers import audit_embeddings

    config = choose_backbone(deep)
    limits = {"cache_dir": str(cache_dir), "max_pixels": max_pixels, "allow_truncated": allow_truncated}
    return audit_embeddings(images, replace(config, **limits))


def update_splits(scan: Scan, images: AuditedImages, findings: list[Finding]) -> tuple[AuditedImages, list[Finding]]:
    """Return `images` and `findings` with the split in whose list each image is, after images were held out."""
    held_out = {path: split for split in SPLITS[1:] for paths in scan.images[split].values() for path in paths}
    numbers = {split: number for number, split in enumerate(SPLITS)}
    splits = images.splits.copy()
    for i, path in enumerate(images.paths):
        if split := held_out.get(path):
            splits[i] = numbers[split]

    def update(image: AuditedImage) -> AuditedImage:
        return replace(image, split=held_out.get(image.path, image.split))

    updated = [
        replace(
            finding,
            groups=[list(map(update, group)) for group in finding.groups],
            excluded=list(map(update, finding.excluded)),
        )
        for finding in findings
    ]
    return replace(images, splits=splits), updated


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
        make_folder(path.parent)
        write_excluded(path, reasons)
    elif path.is_file():
        print(f"warning: the previous lists were written with --fix; the images in {path} are included again")
        try_unlink(path, "it is out of date")


def ensure_lists(config: TrainConfig, datasets_path: str | Path = "datasets", write: bool = True) -> str:
    """Create the lists that `config` lacks at their default places; return the folder of its project.

    Lists in another folder or at other paths belong to the user and are never written. Without lists and images, with
    `config.demo`, the project is the handwritten digits in `demo/`, written if they are missing.

    Raises:
        FileNotFoundError: there are neither lists nor images; or there are no lists and `write` isn't set.
    """
    no_lists = (
        "there are no lists yet, and --summary writes nothing: run python txt_annotation.py or python train.py first"
    )
    files, placed = project_files(""), config.with_paths()
    elsewhere = any(getattr(placed, field) != files[field] for field in files if field != "test_annotation_path")
    if elsewhere or Path(placed.train_annotation_path).is_file():
        return config.data
    limits = {"cache_dir": config.cache_dir, "max_pixels": config.max_pixels, "allow_truncated": config.allow_truncated}
    root = Path(datasets_path)
    if root.is_dir() and any(e.name != "README.md" and not is_hidden(e.name) for e in root.iterdir()):
        if not write:
            raise FileNotFoundError(no_lists)
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
    if not Path(project_files(demo_digits.FOLDER)["train_annotation_path"]).is_file():
        if not write:
            raise FileNotFoundError(no_lists)
        demo_digits.write_demo(demo_digits.FOLDER)
        annotate(demo_digits.FOLDER, out=demo_digits.FOLDER, audit=False)
    return demo_digits.FOLDER


def _relative(path: str, list_path: str | Path) -> str:
    """Return `path` relative to the folder of `list_path`; absolute paths are unchanged."""
    if os.path.isabs(path):
        return path
    try:
        return Path(os.path.relpath(path, Path(list_path).parent)).as_posix()
    except ValueError:  # on Windows the list may be on another drive
        return Path(os.path.abspath(path)).as_posix()
