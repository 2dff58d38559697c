"""Taking a validation set out of the training images."""

from __future__ import annotations

import hashlib
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence


def split_validation(
    images: dict[str, list[str]], val_fraction: float, seed: int, groups: Iterable[Sequence[str]] = ()
) -> dict[str, list[str]]:
    """Take `val_fraction` of each class out of `images`, at least one of each class that has two, and return them.

    Which ones depends on seed and path only: an image that is added moves hardly any other to the other side. Of each
    of `groups`, paths of one or several classes, all are taken or none; so a class may give fewer or more, or none if
    all of it is one group.
    """
    class_of = {path: name for name, paths in images.items() for path in paths}
    wanted = {name: max(1, round(len(paths) * val_fraction)) if len(paths) > 1 else 0 for name, paths in images.items()}
    taken: dict[str, list[str]] = {name: [] for name in images}
    units = join_groups(class_of, groups)
    units.sort(key=lambda unit: hashlib.sha256(os.fsencode(f"{seed}:{min(unit)}")).digest())

    def leaves_some(name: str, count: int) -> bool:
        return len(taken[name]) + count < len(images[name])

    def comes_nearer(name: str, count: int) -> bool:
        return count < 2 * (wanted[name] - len(taken[name])) and leaves_some(name, count)

    def take(unit: list[str], fits: Callable[[str, int], bool]) -> None:
        counts = Counter(class_of[path] for path in unit)
        if all(fits(name, count) for name, count in counts.items()):
            for path in unit:
                taken[class_of[path]].append(path)

    for unit in units:
        take(unit, comes_nearer)
    for unit in sorted(units, key=len):  # for classes whose groups are all far larger than what is wanted
        if any(wanted[class_of[path]] and not taken[class_of[path]] for path in unit):
            take(unit, leaves_some)
    for name, paths in images.items():
        images[name] = sorted(set(paths) - set(taken[name]))
    return {name: sorted(paths) for name, paths in taken.items() if paths}


def join_groups(paths: Iterable[str], groups: Iterable[Sequence[str]]) -> list[list[str]]:
    """Every path once: those that any of `groups` link, directly or over others, together, the rest by themselves."""
    from scipy.cluster.hierarchy import DisjointSet  # slow to import

    units = DisjointSet(paths)
    for group in groups:
        linked = [path for path in group if path in units]
        for path in linked[1:]:
            units.merge(linked[0], path)
    return [sorted(unit) for unit in units.subsets()]


def group_by_name(paths: Sequence[str], group_regex: str) -> list[list[str]]:
    """Paths whose file names have the same part matched by `group_regex`: its first group, or all of it if it has none.
    How many groups there are is printed.

    Raises:
        ValueError: it is no regular expression, or matches no name.
    """
    if not group_regex:
        return []
    try:
        pattern = re.compile(group_regex)
    except re.error as error:
        raise ValueError(f"group_regex={group_regex!r}: it is no regular expression ({error})") from error
    groups: dict[str, list[str]] = {}
    for path in paths:
        match = pattern.search(os.path.basename(path))
        if match and (key := match[1 if pattern.groups else 0]) is not None:
            groups.setdefault(key, []).append(path)
    if not groups:
        raise ValueError(f"group_regex={group_regex!r}: it matches no file name")
    alone = len(paths) - sum(map(len, groups.values()))
    print(f"group_regex: {len(groups)} groups; {alone} images whose names it doesn't match stand by themselves")
    return list(groups.values())
