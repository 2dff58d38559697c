"""Audit a dataset before training: find unreadable, duplicate, mislabeled and otherwise faulty images."""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from utils.annotation.audited_images import AuditedImage, AuditedImages
from utils.annotation.fingerprint_table import FingerprintTable
from utils.annotation.folder_scan import SPLITS
from utils.annotation.near_duplicates import near_duplicate_groups, split_repeated
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
MAX_SIZES = 200_000
"""Images whose sizes are looked at for a shortcut; of more, evenly spaced ones."""


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


def audit_images(images: AuditedImages, groups: Sequence[Sequence[str]] = ()) -> list[Finding]:
    """Return the problems of the images themselves, the most serious first.

    Unreadable files; blank images and placeholders; duplicates and near-duplicates across classes (a label is wrong),
    across splits (data leakage) and within a class; wrong suffixes; shortcuts: file properties that predict the class.
    What depends on the split, which needs these findings, is found by `audit_counts`.

    Args:
        images: of all splits.
        groups: paths that must be in one split, such as the images of one patient.
    """
    return [
        *_unreadable(images),
        *_blank(images),
        *_dark(images),
        *find_duplicates(images),
        *_split_groups(images, groups),
        *_wrong_suffix(images),
        *_shortcuts(images),
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


def _unreadable(images: AuditedImages) -> Iterator[Finding]:
    bad = images.pick(sorted(images.prints.errors))
    if bad:
        causes = Counter(image.fingerprint.error for image in bad).most_common(3)
        details = "; ".join(f"{count} x {cause}" for cause, count in causes)
        message = f"{count_of(len(bad), 'file')} can't be read: {details}"
        yield Finding("unreadable", message, [[image] for image in bad], bad)


def _blank(images: AuditedImages) -> Iterator[Finding]:
    blank = images.pick(np.flatnonzero(images.prints.rows["flat"]))
    if blank:
        yield Finding("blank", f"{count_of(len(blank), 'blank image')} of one color", [[p] for p in blank], blank)


def _dark(images: AuditedImages) -> Iterator[Finding]:
    readable = images.prints.readable()
    highest = images.prints.rows["thumbnail"].max(axis=1)
    dark = images.pick(readable[highest[readable] <= MAX_DARK_LEVEL])
    if dark:
        message = (
            f"{count_of(len(dark), 'nearly black image')}; if they are 12-bit images in 16-bit files, as from "
            f"microscopes, multiply the levels by 16: white is 65535"
        )
        yield Finding("dark", message, [[p] for p in dark])


def find_duplicates(images: AuditedImages) -> Iterator[Finding]:
    """Yield duplicates and near-duplicates among readable images that aren't blank."""
    readable = images.prints.readable()
    compared = readable[~images.prints.rows["flat"][readable]]
    placeholders, copies = [], {}
    for group in duplicate_groups(images.prints, compared):
        # Copies within one class are more likely oversampling.
        is_placeholder = len(group) >= MIN_PLACEHOLDER_COPIES and len(set(images.class_ids[group].tolist())) > 1
        if is_placeholder:
            placeholders.append(group)
        else:
            copies[int(group[0])] = group
    if placeholders:
        groups = [images.pick(group) for group in placeholders]
        members = [image for group in groups for image in group]
        message = f"{count_of(len(members), 'file')} are copies of {count_of(len(groups), 'placeholder image')}"
        yield Finding("placeholder", message, groups, members)
    yield from _by_place("duplicate", [images.pick(group) for group in copies.values()])
    repeated = [*placeholders, *(group[1:] for group in copies.values())]
    distinct = np.setdiff1d(compared, np.concatenate(repeated), assume_unique=True) if repeated else compared
    sizes = np.bincount(images.class_ids[compared], minlength=len(images.class_names))
    near_duplicates, by_nature = [], []
    for indices in near_duplicate_groups(images.prints, distinct):
        group = np.concatenate([copies.get(i, [i]) for i in indices])
        is_natural = len(group) > max(MIN_CLASS_SIZE, MAX_NEAR_DUPLICATES * sizes[images.class_ids[group]].min())
        (by_nature if is_natural else near_duplicates).append(images.pick(group))
    if by_nature:
        count = count_of(sum(map(len, by_nature)), "image")
        message = (
            f"{count} look alike and are a large part of a class, perhaps one scene or a fixed camera; they aren't "
            f"checked further and may be in several splits; use --group-regex to keep related images together"
        )
        yield Finding(SIMILAR_BY_NATURE, message, by_nature)
    yield from _by_place("near-duplicate", near_duplicates)


def duplicate_groups(prints: FingerprintTable, indices: np.ndarray) -> list[np.ndarray]:
    """Return groups of two or more of `indices` (n,), ascending, with the same digest, by their first index.

    Sorting in memory takes 50 bytes an image: less than the thumbnails, which are in memory, too.
    """
    halves = np.ascontiguousarray(prints.rows["digest"][indices]).view(np.uint64)  # (n, 2)
    order = np.lexsort(halves.T)  # stable
    halves = halves[order]
    groups = [indices[group] for group in split_repeated(order, (halves[1:] != halves[:-1]).any(axis=1))]
    return sorted(groups, key=lambda group: group[0])


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


def _split_groups(images: AuditedImages, groups: Sequence[Sequence[str]]) -> Iterator[Finding]:
    index_of = {images.paths[i]: i for i in images.prints.readable()} if groups else {}
    members = [[index_of[path] for path in group if path in index_of] for group in groups]
    divided = [images.pick(group) for group in members if len(set(images.splits[group].tolist())) > 1]
    if divided:
        files = count_of(sum(map(len, divided)), "file")
        message = f"{files} of {count_of(len(divided), 'group')} formed by --group-regex are in different splits"
        excluded = [image for group in divided for image in _redundant(group, "near-duplicate", "across splits")]
        yield Finding("group across splits", message, divided, excluded)


def _wrong_suffix(images: AuditedImages) -> Iterator[Finding]:
    formats = images.prints.formats
    wrong, kinds = [], Counter()
    readable = images.prints.readable()
    for i, number in zip(readable, images.prints.rows["format"][readable], strict=True):
        suffix, kind = os.path.splitext(images.paths[i])[1].lower(), formats[number]
        if suffix not in SUFFIXES.get(kind, ()):
            wrong.append(images[i])
            kinds[suffix, kind] += 1
    if wrong:
        details = ", ".join(f"{count} x {kind} named {suffix}" for (suffix, kind), count in kinds.most_common(3))
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


def _shortcuts(images: AuditedImages) -> Iterator[Finding]:
    readable = images.prints.readable()
    train = readable[images.splits[readable] == SPLITS.index("train")]
    rows = images.prints.rows
    yield from _value_shortcut(images, train, "format", images.prints.formats, rows["format"])
    yield from _value_shortcut(images, train, "color", ["color", "gray"], rows["grey"])
    yield from _size_shortcut(images, train)


def _value_shortcut(
    images: AuditedImages, indices: np.ndarray, attribute: str, values: Sequence[str], numbers: np.ndarray
) -> Iterator[Finding]:
    """Check whether nearly all images of a class have a value that hardly any of another class have.

    Args:
        images: with N images.
        indices: those to check.
        attribute: what the values are.
        values: the values.
        numbers: (N,) of each image's value.
    """
    shape = len(images.class_names), len(values)
    table = np.zeros(shape, np.int64)  # (classes, values)
    np.add.at(table, (images.class_ids[indices], numbers[indices].astype(np.int64)), 1)
    classes = np.flatnonzero(table.sum(axis=1) >= 5)
    parts = table[classes] / table[classes].sum(axis=1, keepdims=True)
    names = [images.class_names[k] for k in classes]
    shortcuts = []
    for value, part in zip(values, parts.T, strict=True):
        nearly_all = [name for name, p in zip(names, part, strict=True) if p >= 0.9]
        hardly_any = [name for name, p in zip(names, part, strict=True) if p <= 0.1]
        if nearly_all and hardly_any:
            shortcuts.append((len(nearly_all), value, nearly_all, hardly_any))
    if shortcuts:  # the value that identifies the fewest classes is the most specific
        _, value, nearly_all, hardly_any = min(shortcuts)
        message = (
            f"{attribute} predicts the class: nearly all images of {', '.join(nearly_all[:5])} are {value}, hardly any "
            f"of {', '.join(hardly_any[:5])}; a network may learn that instead of the content"
        )
        yield Finding("shortcut", message)


def _size_shortcut(images: AuditedImages, indices: np.ndarray) -> Iterator[Finding]:
    """Check whether width and height predict the class, by the cross-validated recall of a small decision tree."""
    indices = indices[:: max(1, -(-len(indices) // MAX_SIZES))]
    counts = np.bincount(images.class_ids[indices], minlength=len(images.class_names))
    usable = indices[counts[images.class_ids[indices]] >= 5]
    ranks = np.unique(images.class_names, return_inverse=True)[1]  # of the names, in the order of the alphabet
    labels = ranks[images.class_ids[usable]]
    sizes = np.log(np.stack([images.prints.rows[side][usable] for side in ("width", "height")], axis=1, dtype=float))
    if len(np.unique(labels)) < 2 or len(np.unique(sizes, axis=0)) < 2:
        return
    from sklearn.model_selection import cross_val_score  # slow to import
    from sklearn.tree import DecisionTreeClassifier

    tree = DecisionTreeClassifier(max_depth=6, min_samples_leaf=2, class_weight="balanced", random_state=0)
    recall = cross_val_score(tree, sizes, labels, cv=5, scoring="balanced_accuracy").mean()
    chance = 1 / len(np.unique(labels))
    if recall >= chance + (1 - chance) / 2:
        message = (
            f"size predicts the class: width and height alone give {recall:.0%} balanced accuracy (chance: "
            f"{chance:.0%}); a network may learn from traces that resizing leaves"
        )
        yield Finding("shortcut", message)
