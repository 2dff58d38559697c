"""CPU time, memory and recall of the audit's search for duplicates among millions of synthetic fingerprints.

    python benchmarks/audit.py [--images 10000000]

Nine of ten images are for training, one for validation. One of a hundred has the pixels of another image, and one of a
hundred is a near-duplicate of another: up to 7 of 64 bits of its hash differ, and the levels of its thumbnail. The last
line is JSON.
"""

from __future__ import annotations

import resource
import time
from collections.abc import Iterable

import numpy as np
import tyro
from measure import print_result

from utils.annotation.audit import Finding, audit_images, duplicate_groups
from utils.annotation.audited_images import AuditedImages
from utils.annotation.fingerprint_table import FingerprintTable
from utils.annotation.near_duplicates import MAX_BITS, near_duplicate_groups

CLASSES = 1000
PLANTED = 100
"""One of so many images is a copy, and one a near-duplicate."""
NOISE = 8
"""Standard deviation of the levels of a near-duplicate from those of its original."""
BLOCK = 100_000


def make_images(count: int, random: np.random.Generator) -> tuple[AuditedImages, np.ndarray, np.ndarray]:
    """Return images, and pairs (n, 2) of indices of planted duplicates and near-duplicates."""
    prints = FingerprintTable(count)
    prints.formats = ["JPEG"]
    rows = prints.rows
    for column, values in (("width", range(300, 700)), ("height", range(200, 600))):
        rows[column] = random.choice(values, count)
    for start in range(0, count, BLOCK):
        block = rows[start : start + BLOCK]
        for column in ("digest", "phash", "thumbnail"):
            block[column] = random.integers(0, 256, block[column].shape, np.uint8)
    some = random.permutation(count)[: 4 * (count // PLANTED)]
    copies, near = some.reshape(2, -1, 2)
    rows[copies[:, 1]] = rows[copies[:, 0]]
    bits = random.permuted(np.tile(np.arange(64) < MAX_BITS, (len(near), 1)), axis=1)
    bits &= random.random((len(near), 64)) < random.random((len(near), 1))  # 0 to MAX_BITS of them
    rows["phash"][near[:, 1]] = rows["phash"][near[:, 0]] ^ np.packbits(bits, axis=1)
    levels = rows["thumbnail"][near[:, 0]] + random.normal(0, NOISE, (len(near), 256)).astype(np.float32)
    rows["thumbnail"][near[:, 1]] = np.clip(levels, 0, 255)
    class_ids = np.sort(random.integers(0, CLASSES, count)).astype(np.int32)
    splits = (np.arange(count) % 10 == 0).astype(np.uint8)
    names = [f"n{k:08d}" for k in range(CLASSES)]
    paths = [f"datasets/{names[k]}/{i:010d}.jpg" for i, k in enumerate(class_ids.tolist())]
    return AuditedImages(paths, splits, class_ids, names, prints), copies, near


def find_recall(pairs: np.ndarray, groups: Iterable[Iterable[int]]) -> tuple[float, int]:
    """Return the part of the planted `pairs` (n, 2) that are in one of `groups`, and how many groups have none."""
    group_of = {int(i): number for number, group in enumerate(groups) for i in group}
    found = [group_of[a] for a, b in pairs.tolist() if a in group_of and group_of[a] == group_of.get(b)]
    return len(found) / max(1, len(pairs)), len(set(group_of.values()) - set(found))


def groups_of(findings: Iterable[Finding], kind: str) -> Iterable[list[int]]:
    """The groups of indices of all findings of one kind, wherever its images are."""
    groups = (group for finding in findings if finding.kind.startswith(f"{kind} ") for group in finding.groups)
    return ([int(image.path[-14:-4]) for image in group] for group in groups)


def peak_gigabytes() -> float:
    """The most memory that this process has had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def main(images: int = 1_000_000, seed: int = 0) -> None:
    """Make fingerprints with planted duplicates, and print what is found, when, and in how much memory.

    Args:
        images: how many.
        seed: of the fingerprints.
    """
    audited, copies, near = make_images(images, np.random.default_rng(seed))
    figures: dict[str, float] = {"images": images, "made_gb": peak_gigabytes()}

    started = time.process_time()
    every = audited.prints.readable()
    repeated = duplicate_groups(audited.prints, every)
    figures |= {"duplicates_s": time.process_time() - started, "duplicates_gb": peak_gigabytes()}
    figures["duplicates_found"], figures["duplicates_other"] = find_recall(copies, repeated)

    started = time.process_time()
    alike = near_duplicate_groups(audited.prints, np.setdiff1d(every, copies[:, 1]))
    figures |= {"near_s": time.process_time() - started, "near_gb": peak_gigabytes()}
    figures["near_found"], figures["near_other"] = find_recall(near, alike)
    print(figures, flush=True)

    started = time.process_time()
    findings = audit_images(audited)
    figures |= {"audit_s": time.process_time() - started, "audit_gb": peak_gigabytes()}
    figures["audit_duplicates_found"], _ = find_recall(copies, groups_of(findings, "duplicate"))
    figures["audit_near_found"], _ = find_recall(near, groups_of(findings, "near-duplicate"))
    print_result("audit", **{name: round(value, 3) for name, value in figures.items()})


if __name__ == "__main__":
    tyro.cli(main)
