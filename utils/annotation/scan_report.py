"""Report what was found in the folders, and what of it is used."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from utils.annotation.classes import NOT_NAMED, Repeat
from utils.annotation.folder_scan import SPLITS, Scan, split_of
from utils.system.text import count_of, shorten_list
from utils.system.text import format_table as format_rows


def format_table(scan: Scan, names: list[str]) -> str:
    """Return a table of image counts and skipped files per class."""
    folders = sorted({*scan.unused, *scan.skipped} - {"", *names})
    rows = [("class", *SPLITS, "skipped")]
    for name in [*names, *folders]:
        counts = [str(scan.count(split, name)) if name in names else "-" for split in SPLITS]
        reasons = [f"{count} {reason}" for reason, count in sorted(scan.skipped.get(name, Counter()).items())]
        unused = scan.unused.get(name, Counter())
        reasons += [f"{count_of(count, 'image')}: {reason}" for reason, count in sorted(unused.items())]
        if name in names or reasons:
            rows.append((name, *counts, ", ".join(reasons)))
    totals = [str(sum(scan.count(split, name) for name in names)) for split in SPLITS]
    outside = ", ".join(f"{count} {reason}" for reason, count in scan.skipped.get("", Counter()).items())
    rows.append(("all", *totals, outside))
    return format_rows(rows, right=SPLITS)


def list_warnings(scan: Scan, names: list[str], classes_path: str | Path, repeat: Repeat) -> list[str]:
    """Return warnings about classes and images that aren't used as expected."""
    warnings = [
        f"{name} is used as a class, since its folder directly contains images" for name in names if split_of(name)
    ]
    if missing := [name for name in names if not scan.count("train", name)]:
        warnings.append(
            f"no train images of {shorten_list(missing)}; to remove such classes: {repeat(class_file='rewrite')}"
        )
    if missing := [name for name in names if not scan.count("val", name)]:
        warnings.append(f"no val images of {shorten_list(missing)}")
    for reason in sorted({reason for reasons in scan.unused.values() for reason in reasons}):
        folders = sorted(name for name, reasons in scan.unused.items() if reasons[reason])
        total = sum(scan.unused[name][reason] for name in folders)
        remedy = f", {classes_path}; to add them: {repeat(class_file='add')}" if reason == NOT_NAMED else ""
        warnings.append(f"{count_of(total, 'image')} of {shorten_list(folders)} not in the lists: {reason}{remedy}")
    return [f"warning: {warning}" for warning in warnings]
