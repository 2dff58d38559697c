"""What is wrong with a folder of images, found before a long run is spent on it."""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from utils.annotation.fingerprints import Fingerprint
from utils.annotation.folder_scan import SPLITS
from utils.annotation.near_duplicates import near_duplicate_groups
from utils.data.image_io import SUFFIXES

FEW = 10
"""Training images below which a class is called tiny."""
MANY_COPIES = 5
"""Equal images from which on they are taken for a placeholder, such as "image not available"."""
SIMILAR_BY_NATURE = "alike by nature"
MOST_ALIKE = 1 / 3
"""The part of a class that can look alike before that is taken for how its images are, not for a fault."""
DARK = 16
"""Level of 255 that nothing in an image is brighter than if it has 12 bits in a file of 16."""
UNEVEN = 10
"""How many times the smallest class the largest may be."""


@dataclass(frozen=True)
class AuditedImage:
    """An image, where it belongs, and what is known of it."""

    path: str
    split: str
    class_name: str
    fingerprint: Fingerprint


@dataclass(frozen=True)
class Finding:
    """Something that is wrong.

    Attributes:
        kind: what, in a word or two that never change.
        message: what, in a sentence.
        groups: the images, those that belong together side by side.
        excluded: those that `--fix` leaves out of the lists.
    """

    kind: str
    message: str
    groups: list[list[AuditedImage]] = field(default_factory=list)
    excluded: list[AuditedImage] = field(default_factory=list)


def find_faults(
    images: Sequence[AuditedImage], class_names: Sequence[str], groups: Sequence[Sequence[str]] = ()
) -> list[Finding]:
    """All that is wrong with the images, the worst first.

    Unreadable files; blank images and placeholders; images that are equal or look alike across classes (one of the
    labels is wrong), across splits (the test is no test) and within a class; wrong suffixes; classes that are missing,
    tiny, or far larger than others; and shortcuts: what tells the class without looking at the image.

    Args:
        images: of all splits.
        class_names: the classes that there should be.
        groups: paths that belong together, such as images of one patient, and should be in one split.
    """
    readable = [image for image in images if not image.fingerprint.error]
    return [
        *_unreadable(images),
        *_blank(readable),
        *_dark(readable),
        *find_duplicates(readable),
        *_split_groups(readable, groups),
        *_wrong_suffix(readable),
        *_class_sizes(readable, class_names),
        *_shortcuts(readable),
    ]


def linked(findings: Iterable[Finding]) -> list[list[str]]:
    """Paths of images that `findings` show together, and that should be in one split therefore. Not those that are
    alike by nature: a class of which all is one group could be in no more than one."""
    return [
        [image.path for image in group]
        for finding in findings
        if finding.kind != SIMILAR_BY_NATURE
        for group in finding.groups
    ]


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _unreadable(images: Sequence[AuditedImage]) -> Iterator[Finding]:
    bad = [image for image in images if image.fingerprint.error]
    if bad:
        causes = Counter(image.fingerprint.error for image in bad).most_common(3)
        told = "; ".join(f"{count} x {cause}" for cause, count in causes)
        yield Finding(
            "unreadable", f"{_count(len(bad), 'file')} can't be read: {told}", [[image] for image in bad], bad
        )


def _blank(images: Sequence[AuditedImage]) -> Iterator[Finding]:
    blank = [image for image in images if image.fingerprint.flat]
    if blank:
        yield Finding("blank", f"blank: {_count(len(blank), 'image')} of one colour", [[p] for p in blank], blank)


def _dark(images: Sequence[AuditedImage]) -> Iterator[Finding]:
    dark = [p for p in images if max(p.fingerprint.thumbnail, default=255) <= DARK]
    if dark:
        message = (
            f"nearly black: {_count(len(dark), 'image')}; if these are of a microscope or the like, with 12 bits in "
            f"files of 16, multiply their levels by 16: of 16 bits 65535 is white"
        )
        yield Finding("dark", message, [[p] for p in dark])


def find_duplicates(images: Sequence[AuditedImage]) -> Iterator[Finding]:
    """Of readable images those that are equal or look alike; blank ones are left out."""
    images = [image for image in images if not image.fingerprint.flat]
    by_digest = defaultdict(list)
    for image in images:
        by_digest[image.fingerprint.digest].append(image)
    many, rest = [], []
    for group in by_digest.values():
        # Copies in one class are more likely there to make it larger.
        is_placeholder = len(group) >= MANY_COPIES and len({image.class_name for image in group}) > 1
        (many if is_placeholder else rest).append(group)
    if many:
        copies = [image for group in many for image in group]
        told = f"{_count(len(copies), 'file')} show {_count(len(many), 'image')} over and over, perhaps placeholders"
        yield Finding("placeholder", told, many, copies)
    yield from _by_place("equal", [group for group in rest if len(group) > 1])
    sizes = Counter(image.class_name for image in images)
    near_duplicates, by_nature = [], []
    for indices in near_duplicate_groups([group[0].fingerprint for group in rest]):
        group = [image for i in indices for image in rest[i]]
        smallest = min(sizes[image.class_name] for image in group)
        (by_nature if len(group) > max(FEW, MOST_ALIKE * smallest) else near_duplicates).append(group)
    if by_nature:
        told = _count(sum(map(len, by_nature)), "image")
        message = (
            f"{told} look alike, a large part of a class: one scene or camera? They aren't told apart any further, and "
            f"may be in several splits: what belongs together of them, --group-regex keeps together"
        )
        yield Finding(SIMILAR_BY_NATURE, message, by_nature)
    yield from _by_place("alike", near_duplicates)


def _by_place(what: str, groups: Sequence[list[AuditedImage]]) -> Iterator[Finding]:
    """Findings on groups of images that are equal or look alike, by where they lie."""
    adjective = {"equal": "the same pixels", "alike": "nearly the same image"}[what]
    places = defaultdict(list)
    for group in groups:
        if len({image.class_name for image in group}) > 1:
            places["across classes"].append(group)
        elif len({image.split for image in group}) > 1:
            places["across splits"].append(group)
        else:
            places["within a class"].append(group)
    for place, consequence in (
        ("across classes", "under different classes: one of the labels is wrong"),
        ("across splits", "in different splits: what is tested was seen in training"),
        ("within a class", "more than once in a class"),
    ):
        if found := places[place]:
            files = _count(sum(map(len, found)), "file")
            message = f"{files} in {_count(len(found), 'group')} show {adjective} {consequence}"
            excluded = [image for group in found for image in _superfluous(group, what, place)]
            yield Finding(f"{what} {place}", message, found, excluded)


def _superfluous(group: list[AuditedImage], what: str, place: str) -> list[AuditedImage]:
    """Those of a group that lists without its fault would lack.

    Of equals all, where the label is in doubt, else all but one. Of those that only look alike, what is not in the
    split that is most precious: test, then val.
    """
    if what == "equal" and place == "across classes":
        return group
    if what == "alike" and place != "across splits":
        return []
    precious = max(group, key=lambda image: SPLITS.index(image.split)).split
    if what == "alike":
        return [image for image in group if image.split != precious]
    kept = next(image for image in group if image.split == precious)
    return [image for image in group if image is not kept]


def _split_groups(images: Sequence[AuditedImage], groups: Sequence[Sequence[str]]) -> Iterator[Finding]:
    by_path = {image.path: image for image in images}
    found = [[by_path[path] for path in group if path in by_path] for group in groups]
    found = [group for group in found if len({image.split for image in group}) > 1]
    if found:
        files = _count(sum(map(len, found)), "file")
        message = f"{files} of {_count(len(found), 'group')} by --group-regex are in different splits"
        excluded = [image for group in found for image in _superfluous(group, "alike", "across splits")]
        yield Finding("group across splits", message, found, excluded)


def _wrong_suffix(images: Sequence[AuditedImage]) -> Iterator[Finding]:
    wrong = [
        image
        for image in images
        if os.path.splitext(image.path)[1].lower() not in SUFFIXES.get(image.fingerprint.format, ())
    ]
    if wrong:
        kinds = Counter((os.path.splitext(p.path)[1].lower(), p.fingerprint.format) for p in wrong).most_common(3)
        told = ", ".join(f"{count} x {suffix} that is {kind}" for (suffix, kind), count in kinds)
        message = f"of {_count(len(wrong), 'file')} the name is wrong: {told}; Thaw reads them all the same"
        yield Finding("wrong suffix", message, [[image] for image in wrong])


def _class_sizes(images: Sequence[AuditedImage], class_names: Sequence[str]) -> Iterator[Finding]:
    counts = {split: Counter(p.class_name for p in images if p.split == split) for split in SPLITS}
    for split, count in counts.items():
        missing = [name for name in class_names if not count[name]]
        if count and missing:
            yield Finding("missing class", f"no {split} images of {', '.join(missing)}")
    train = {name: counts["train"][name] for name in class_names if counts["train"][name]}
    tiny = [f"{name} ({count})" for name, count in train.items() if count < FEW]
    if tiny:
        yield Finding("tiny class", f"fewer than {FEW} training images of {', '.join(tiny)}")
    if train and max(train.values()) >= UNEVEN * min(train.values()):
        largest, smallest = max(train, key=train.get), min(train, key=train.get)
        told = f"{largest} has {train[largest]} training images and {smallest} {train[smallest]}"
        yield Finding("imbalance", f"{told}: see class_weights and sampler in utils/config/train_config.py")


def _shortcuts(images: Sequence[AuditedImage]) -> Iterator[Finding]:
    train = [image for image in images if image.split == "train"]
    for what, value_of in (
        ("format", lambda image: image.fingerprint.format),
        ("colour", lambda image: "grey" if image.fingerprint.grey else "colour"),
    ):
        yield from _telling_values(train, what, value_of)
    yield from _telling_size(train)


def _telling_values(images: Sequence[AuditedImage], what: str, value_of) -> Iterator[Finding]:
    """Whether nearly all images of some class and hardly any of another have the same value."""
    by_class = defaultdict(Counter)
    for image in images:
        by_class[image.class_name][value_of(image)] += 1
    classes = {name: count for name, count in by_class.items() if count.total() >= 5}
    telling = []
    for value in sorted({value for count in classes.values() for value in count}):
        parts = {name: count[value] / count.total() for name, count in classes.items()}
        nearly_all = [name for name, part in parts.items() if part >= 0.9]
        hardly_any = [name for name, part in parts.items() if part <= 0.1]
        if nearly_all and hardly_any:
            telling.append((len(nearly_all), value, nearly_all, hardly_any))
    if telling:  # of two values that are each other's opposite, the one that tells more
        _, value, nearly_all, hardly_any = min(telling)
        message = (
            f"{what} tells the class: nearly all of {', '.join(nearly_all[:5])} are {value} and hardly any of "
            f"{', '.join(hardly_any[:5])}; a network learns that instead of what the images show"
        )
        yield Finding("shortcut", message)


def _telling_size(images: Sequence[AuditedImage]) -> Iterator[Finding]:
    """Whether width and height alone tell the class: a small decision tree, judged on what it wasn't shown."""
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
            f"size tells the class: from width and height alone {recall:.0%} are told right ({chance:.0%} by chance), "
            f"and resizing may leave enough of it for a network to learn that"
        )
        yield Finding("shortcut", message)
