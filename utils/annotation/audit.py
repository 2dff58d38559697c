"""Audit a dataset before training: find unreadable, duplicate, mislabeled and otherwise faulty images."""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from utils.annotation.fingerprints import Fingerprint
from utils.annotation.folder_scan import SPLITS
from utils.annotation.near_duplicates import near_duplicate_groups
from utils.data.image_io import SUFFIXES
from utils.system.text import count_of, shorten_list

MIN_CLASS_SIZE = 10
"""A class with fewer training images is reported as tiny."""
MIN_PLACEHOLDER_COPIES = 5
"""So many duplicates in several classes count as a placeholder, such as "image not available"."""
SIMILAR_BY_NATURE = "similar by nature"
MAX_NEAR_DUPLICATES = 1 / 3
"""If a larger fraction of a class is near-duplicates, its images are similar by nature."""
MAX_DARK_LEVEL = 16
"""Highest level, on a scale to 255, of 12-bit images in 16-bit files."""
MAX_IMBALANCE = 10
"""Largest ratio of class sizes that isn't reported."""


@dataclass(frozen=True)
class AuditedImage:
    """An image with its split, class and fingerprint."""

    path: str
    split: str
    class_name: str
    fingerprint: Fingerprint


@dataclass(frozen=True)
class Finding:
    """A problem found by the audit.

    Attributes:
        kind: a fixed name, part of the audit.json interface.
        message: a description in one sentence.
        groups: the images in groups, for example of duplicates.
        excluded: the images that `--fix` excludes from the lists.
        likely_classes: for likely wrong labels, path -> the class that the image more likely has.
    """

    kind: str
    message: str
    groups: list[list[AuditedImage]] = field(default_factory=list)
    excluded: list[AuditedImage] = field(default_factory=list)
    likely_classes: dict[str, str] = field(default_factory=dict)


def audit_images(images: Sequence[AuditedImage], groups: Sequence[Sequence[str]] = ()) -> list[Finding]:
    """Return the problems of the images themselves, the most serious first.

    Unreadable files; blank images and placeholders; duplicates and near-duplicates across classes (a label is wrong),
    across splits (data leakage) and within a class; wrong suffixes; shortcuts: file properties that predict the class.
    What depends on the split, which needs these findings, is found by `audit_counts`.

    Args:
        images: of all splits.
        groups: paths that must be in one split, such as the images of one patient.
    """
    readable = [image for image in images if not image.fingerprint.error]
    return [
        *_unreadable(images),
        *_blank(readable),
        *_dark(readable),
        *find_duplicates(readable),
        *_split_groups(readable, groups),
        *_wrong_suffix(readable),
        *_shortcuts(readable),
    ]


def grouped_images(findings: Iterable[Finding]) -> list[list[str]]:
    """Return groups of paths in `findings` that must be in one split.

    Images that are similar by nature are omitted: a class that is one group can't be split.
    """
    return [
        [image.path for image in group]
        for finding in findings
        if finding.kind != SIMILAR_BY_NATURE
        for group in finding.groups
    ]


def _unreadable(images: Sequence[AuditedImage]) -> Iterator[Finding]:
    bad = [image for image in images if image.fingerprint.error]
    if bad:
        causes = Counter(image.fingerprint.error for image in bad).most_common(3)
        details = "; ".join(f"{count} x {cause}" for cause, count in causes)
        message = f"{count_of(len(bad), 'file')} can't be read: {details}"
        yield Finding("unreadable", message, [[image] for image in bad], bad)


def _blank(images: Sequence[AuditedImage]) -> Iterator[Finding]:
    blank = [image for image in images if image.fingerprint.flat]
    if blank:
        yield Finding("blank", f"{count_of(len(blank), 'blank image')} of one color", [[p] for p in blank], blank)


def _dark(images: Sequence[AuditedImage]) -> Iterator[Finding]:
    dark = [p for p in images if max(p.fingerprint.thumbnail, default=255) <= MAX_DARK_LEVEL]
    if dark:
        message = (
            f"{count_of(len(dark), 'nearly black image')}; if they are 12-bit images in 16-bit files, as from "
            f"microscopes, multiply the levels by 16: white is 65535"
        )
        yield Finding("dark", message, [[p] for p in dark])


def find_duplicates(images: Sequence[AuditedImage]) -> Iterator[Finding]:
    """Yield duplicates and near-duplicates among readable images that aren't blank."""
    images = [image for image in images if not image.fingerprint.flat]
    by_digest = defaultdict(list)
    for image in images:
        by_digest[image.fingerprint.digest].append(image)
    placeholders, rest = [], []
    for group in by_digest.values():
        # Copies within one class are more likely oversampling.
        is_placeholder = len(group) >= MIN_PLACEHOLDER_COPIES and len({image.class_name for image in group}) > 1
        (placeholders if is_placeholder else rest).append(group)
    if placeholders:
        copies = [image for group in placeholders for image in group]
        message = f"{count_of(len(copies), 'file')} are copies of {count_of(len(placeholders), 'placeholder image')}"
        yield Finding("placeholder", message, placeholders, copies)
    yield from _by_place("duplicate", [group for group in rest if len(group) > 1])
    sizes = Counter(image.class_name for image in images)
    near_duplicates, by_nature = [], []
    for indices in near_duplicate_groups([group[0].fingerprint for group in rest]):
        group = [image for i in indices for image in rest[i]]
        smallest = min(sizes[image.class_name] for image in group)
        is_natural = len(group) > max(MIN_CLASS_SIZE, MAX_NEAR_DUPLICATES * smallest)
        (by_nature if is_natural else near_duplicates).append(group)
    if by_nature:
        count = count_of(sum(map(len, by_nature)), "image")
        message = (
            f"{count} look alike and are a large part of a class, perhaps one scene or a fixed camera; they aren't "
            f"checked further and may be in several splits; use --group-regex to keep related images together"
        )
        yield Finding(SIMILAR_BY_NATURE, message, by_nature)
    yield from _by_place("near-duplicate", near_duplicates)


def _by_place(kind: str, groups: Sequence[list[AuditedImage]]) -> Iterator[Finding]:
    """Yield findings for groups of duplicates or near-duplicates: across classes, across splits, within a class."""
    content = {"duplicate": "the same pixels", "near-duplicate": "nearly the same image"}[kind]
    places = defaultdict(list)
    for group in groups:
        if len({image.class_name for image in group}) > 1:
            places["across classes"].append(group)
        elif len({image.split for image in group}) > 1:
            places["across splits"].append(group)
        else:
            places["within a class"].append(group)
    for place, consequence in (
        ("across classes", "in different classes: one of the labels is wrong"),
        ("across splits", "in different splits: data leaks between them"),
        ("within a class", "within a class"),
    ):
        if members := places[place]:
            files = count_of(sum(map(len, members)), "file")
            message = f"{files} in {count_of(len(members), 'group')} show {content} {consequence}"
            excluded = [image for group in members for image in _redundant(group, kind, place)]
            yield Finding(f"{kind} {place}", message, members, excluded)


def _redundant(group: list[AuditedImage], kind: str, place: str) -> list[AuditedImage]:
    """Return the images of a group that `--fix` excludes.

    Duplicates: all if the labels contradict, else all but one. Near-duplicates across splits: those outside the
    protected split, which is test if it has any, else val.
    """
    if kind == "duplicate" and place == "across classes":
        return group
    if kind == "near-duplicate" and place != "across splits":
        return []
    protected = max(group, key=lambda image: SPLITS.index(image.split)).split
    if kind == "near-duplicate":
        return [image for image in group if image.split != protected]
    kept = next(image for image in group if image.split == protected)
    return [image for image in group if image is not kept]


def _split_groups(images: Sequence[AuditedImage], groups: Sequence[Sequence[str]]) -> Iterator[Finding]:
    by_path = {image.path: image for image in images}
    members = [[by_path[path] for path in group if path in by_path] for group in groups]
    divided = [group for group in members if len({image.split for image in group}) > 1]
    if divided:
        files = count_of(sum(map(len, divided)), "file")
        message = f"{files} of {count_of(len(divided), 'group')} formed by --group-regex are in different splits"
        excluded = [image for group in divided for image in _redundant(group, "near-duplicate", "across splits")]
        yield Finding("group across splits", message, divided, excluded)


def _wrong_suffix(images: Sequence[AuditedImage]) -> Iterator[Finding]:
    wrong = [
        image
        for image in images
        if os.path.splitext(image.path)[1].lower() not in SUFFIXES.get(image.fingerprint.format, ())
    ]
    if wrong:
        kinds = Counter((os.path.splitext(p.path)[1].lower(), p.fingerprint.format) for p in wrong).most_common(3)
        details = ", ".join(f"{count} x {kind} named {suffix}" for (suffix, kind), count in kinds)
        message = f"{count_of(len(wrong), 'file')} with a wrong suffix: {details}; Thaw reads them anyway"
        yield Finding("wrong suffix", message, [[image] for image in wrong])


def audit_counts(counts: Mapping[str, Mapping[str, int]], class_names: Sequence[str]) -> list[Finding]:
    """Return the missing, tiny and imbalanced classes.

    Args:
        counts: split -> class -> number of images in the list.
        class_names: the expected classes.
    """
    findings = []
    for split in SPLITS:
        missing = [name for name in class_names if not counts[split].get(name)]
        if missing and any(counts[split].values()):
            findings.append(Finding("missing class", f"no {split} images of {shorten_list(missing)}"))
    train = {name: counts["train"][name] for name in class_names if counts["train"].get(name)}
    tiny = [f"{name} ({count})" for name, count in train.items() if count < MIN_CLASS_SIZE]
    if tiny:
        message = f"fewer than {MIN_CLASS_SIZE} training images of {shorten_list(tiny)}"
        findings.append(Finding("tiny class", message))
    for split in SPLITS[1:]:
        if single := [name for name in class_names if counts[split].get(name) == 1]:
            message = (
                f"a single {split} image of {shorten_list(single)}: the accuracy of such a class is either 0 or 100%"
            )
            findings.append(Finding("tiny class", message))
    if train and max(train.values()) >= MAX_IMBALANCE * min(train.values()):
        largest, smallest = max(train, key=train.get), min(train, key=train.get)
        sizes = f"{largest} has {count_of(train[largest], 'training image')} and {smallest} {train[smallest]}"
        message = f"{sizes}; see class_weights and sampler in utils/config/train_config.py"
        findings.append(Finding("imbalance", message))
    return findings


def _shortcuts(images: Sequence[AuditedImage]) -> Iterator[Finding]:
    train = [image for image in images if image.split == "train"]
    yield from _value_shortcut(train, "format", lambda image: image.fingerprint.format)
    yield from _value_shortcut(train, "color", lambda image: "gray" if image.fingerprint.grey else "color")
    yield from _size_shortcut(train)


def _value_shortcut(
    images: Sequence[AuditedImage], attribute: str, value_of: Callable[[AuditedImage], str]
) -> Iterator[Finding]:
    """Check whether nearly all images of a class have a value that hardly any of another class have."""
    by_class = defaultdict(Counter)
    for image in images:
        by_class[image.class_name][value_of(image)] += 1
    classes = {name: count for name, count in by_class.items() if count.total() >= 5}
    shortcuts = []
    for value in sorted({value for count in classes.values() for value in count}):
        parts = {name: count[value] / count.total() for name, count in classes.items()}
        nearly_all = [name for name, part in parts.items() if part >= 0.9]
        hardly_any = [name for name, part in parts.items() if part <= 0.1]
        if nearly_all and hardly_any:
            shortcuts.append((len(nearly_all), value, nearly_all, hardly_any))
    if shortcuts:  # the value that identifies the fewest classes is the most specific
        _, value, nearly_all, hardly_any = min(shortcuts)
        message = (
            f"{attribute} predicts the class: nearly all images of {', '.join(nearly_all[:5])} are {value}, hardly any "
            f"of {', '.join(hardly_any[:5])}; a network may learn that instead of the content"
        )
        yield Finding("shortcut", message)


def _size_shortcut(images: Sequence[AuditedImage]) -> Iterator[Finding]:
    """Check whether width and height predict the class, by the cross-validated recall of a small decision tree."""
    counts = Counter(image.class_name for image in images)
    usable = [image for image in images if counts[image.class_name] >= 5]
    names = sorted({image.class_name for image in usable})
    sizes = np.log([[p.fingerprint.width, p.fingerprint.height] for p in usable]) if usable else np.zeros((0, 2))
    if len(names) < 2 or len(np.unique(sizes, axis=0)) < 2:
        return
    from sklearn.model_selection import cross_val_score  # slow to import
    from sklearn.tree import DecisionTreeClassifier

    tree = DecisionTreeClassifier(max_depth=6, min_samples_leaf=2, class_weight="balanced", random_state=0)
    labels = [image.class_name for image in usable]
    recall = cross_val_score(tree, sizes, labels, cv=5, scoring="balanced_accuracy").mean()
    chance = 1 / len(names)
    if recall >= chance + (1 - chance) / 2:
        message = (
            f"size predicts the class: width and height alone give {recall:.0%} balanced accuracy (chance: "
            f"{chance:.0%}); a network may learn from traces that resizing leaves"
        )
        yield Finding("shortcut", message)
