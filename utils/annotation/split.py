"""Split validation or test images off the training images, keeping groups together."""

from __future__ import annotations

import hashlib
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

from utils.system.text import count_of


def split_validation(
    images: dict[str, list[str]], val_fraction: float, seed: int, groups: Iterable[Sequence[str]] = ()
) -> dict[str, list[str]]:
    """Move `val_fraction` of each class, at least one image of a class with two, out of `images` and return them.

    The choice depends on seed and path only, so adding images moves few others between the splits. Each of `groups`,
    whose paths may be of several classes, is moved as a whole, so fractions may differ; a class that is one group keeps
    all its images.
    """
    class_of = {path: name for name, paths in images.items() for path in paths}
    target = {name: max(1, round(len(paths) * val_fraction)) if len(paths) > 1 else 0 for name, paths in images.items()}
    moved: dict[str, list[str]] = {name: [] for name in images}
    units = join_groups(class_of, groups)
    units.sort(key=lambda unit: hashlib.sha256(os.fsencode(f"{seed}:{min(unit)}")).digest())

    def leaves_others(name: str, count: int) -> bool:
        return len(moved[name]) + count < len(images[name])

    def approaches_target(name: str, count: int) -> bool:
        return count < 2 * (target[name] - len(moved[name])) and leaves_others(name, count)

    def move(unit: list[str], fits: Callable[[str, int], bool]) -> None:
        counts = Counter(class_of[path] for path in unit)
        if all(fits(name, count) for name, count in counts.items()):
            for path in unit:
                moved[class_of[path]].append(path)

    for unit in units:
        move(unit, approaches_target)
    for unit in sorted(units, key=len):  # for classes whose groups are all much larger than the target
        if any(target[class_of[path]] and not moved[class_of[path]] for path in unit):
            move(unit, leaves_others)
    for name, paths in images.items():
        images[name] = sorted(set(paths) - set(moved[name]))
    return {name: sorted(paths) for name, paths in moved.items() if paths}


def join_groups(paths: Iterable[str], groups: Iterable[Sequence[str]]) -> list[list[str]]:
    """Partition `paths`: paths connected by `groups`, directly or through others, are in one part."""
    from scipy.cluster.hierarchy import DisjointSet  # slow to import

    paths = dict.fromkeys(paths)
    joined = DisjointSet()  # only of the paths in groups: it takes half a kilobyte for each
    for group in groups:
        members = [path for path in group if path in paths]
        for path in members:
            joined.add(path)
            joined.merge(members[0], path)
    parts, placed = [], set()
    for path in paths:
        if path not in joined:
            parts.append([path])
        elif joined[path] not in placed:
            placed.add(joined[path])
            parts.append(sorted(joined.subset(path)))
    return parts


def group_by_name(paths: Sequence[str], group_regex: str) -> list[list[str]]:
    """Group paths by the part of their file names that `group_regex`, or its first group, matches.

    Raises:
        ValueError: `group_regex` isn't a regular expression, or matches no file name.
    """
    if not group_regex:
        return []
    try:
        pattern = re.compile(group_regex)
    except re.error as error:
        raise ValueError(f"group_regex={group_regex!r}: not a regular expression ({error})") from error
    groups: dict[str, list[str]] = {}
    for path in paths:
        match = pattern.search(os.path.basename(path))
        if match and (key := match[1 if pattern.groups else 0]) is not None:
            groups.setdefault(key, []).append(path)
    if not groups:
        raise ValueError(f"group_regex={group_regex!r}: matches no file name")
    unmatched = len(paths) - sum(map(len, groups.values()))
    print(f"group_regex: {count_of(len(groups), 'group')}; {count_of(unmatched, 'image')} without a match, not grouped")
    return list(groups.values())
