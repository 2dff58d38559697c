"""Report audit findings: in the terminal, as audit.json, and as a page of thumbnails."""

from __future__ import annotations

import base64
import hashlib
import os
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from heapq import nsmallest
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np

from utils.annotation.audit import Finding
from utils.annotation.audited_images import AuditedImage, AuditedImages
from utils.annotation.fingerprints import Fingerprints
from utils.annotation.folder_scan import SPLITS
from utils.system.files import make_folder, write_json, write_text
from utils.system.pages import link_to, render_page
from utils.system.text import printable
from utils.system.thread_map import map_parallel

PAGE, SAMPLES_PAGE = "audit.html", "samples.html"
MAX_PRINTED = 3
"""Groups per finding, and images per group, printed in the terminal."""
MAX_GROUPS, MAX_IMAGES = 12, 6
"""Groups per finding, and images per group, that are unfolded on the page."""
MAX_PREVIEWS = 4000
"""Thumbnails on the page, about 5 kB each; further images are links without one."""
MAX_SAMPLES, MAX_SAMPLES_PER_CLASS = 1000, 12
"""Samples on the page, of all classes and of one."""
MAX_OPEN = 20
"""With more classes, their samples are folded."""


def format_findings(findings: Sequence[Finding], folder: str | Path, fix: bool) -> str:
    """Format findings for the terminal, with some paths of each.

    Args:
        findings: from `utils.annotation.audit.audit_images`.
        folder: the folder of the reports.
        fix: whether images were excluded from the lists.
    """
    if not findings:
        return f"audit: no problems found; {folder}/{PAGE} has samples of each class"
    width = max(len(finding.kind) for finding in findings)
    lines = []
    for finding in findings:
        lines.append(f"  {finding.kind:<{width}}  {printable(finding.message)}")
        for group in finding.groups[:MAX_PRINTED]:
            lines.append(f"  {'':<{width}}    {', '.join(_described(image, finding) for image in group[:MAX_PRINTED])}")
    lines.append(f"  full report: {folder}/{PAGE}, {folder}/audit.json")
    if not fix and (count := len(excluded_paths(findings))):
        lines.append(f"  the same command with --fix would exclude {count} of them from the lists; no file is changed")
    return "\n".join(["audit:", *lines])


def excluded_paths(findings: Sequence[Finding]) -> set[str]:
    """The images that `--fix` excludes from the lists."""
    return {image.path for finding in findings for image in finding.excluded}


def write_audit(
    folder: str | Path,
    findings: Sequence[Finding],
    images: AuditedImages,
    fingerprints: Fingerprints,
    fix: bool = False,
) -> None:
    """Write `audit.json` with all paths, and `audit.html` with all groups, class counts and samples of each class.

    Args:
        folder: of both files.
        findings: from `utils.annotation.audit.audit_images`.
        images: all images.
        fingerprints: where previews come from.
        fix: whether images were excluded from the lists.
    """
    content = {"images": len(images), "fix": fix, "findings": [_as_dict(finding) for finding in findings]}
    make_folder(Path(folder))
    write_json(Path(folder, "audit.json"), content)
    excluded = excluded_paths(findings)
    unlisted = excluded if fix else ()
    samples = choose_samples(images, unlisted)
    groups = chain(samples.values(), *(finding.groups for finding in findings))
    figures = Figures(Path(folder), make_previews(chain.from_iterable(groups), fingerprints))
    shown = [
        {
            "kind": finding.kind,
            "message": printable(finding.message),
            "excluded": len(finding.excluded),
            "groups": figures.of(finding.groups, finding.likely_classes),
        }
        for finding in findings
    ]
    counts = {"audited": len(images), "excluded": len(excluded)}
    page = _render(images, samples, figures, unlisted, findings=shown, fix=fix, **counts)
    write_text(Path(folder, PAGE), page)


def write_samples(folder: str | Path, images: AuditedImages, fingerprints: Fingerprints) -> Path:
    """Write `samples.html` with class counts and samples of each class, and return its path.

    Args:
        folder: of the page.
        images: all images; their fingerprints aren't needed.
        fingerprints: where previews come from.
    """
    path = Path(folder, SAMPLES_PAGE)
    make_folder(path.parent)
    samples = choose_samples(images)
    figures = Figures(path.parent, make_previews(chain.from_iterable(samples.values()), fingerprints))
    write_text(path, _render(images, samples, figures, (), findings=None))
    return path


class Figures:
    """Images as the page shows them.

    Args:
        folder: of the page.
        previews: path -> preview, from `make_previews`.
    """

    def __init__(self, folder: Path, previews: Mapping[str, str]) -> None:
        self.folder = folder
        self.previews = previews

    def of(
        self, groups: Iterable[Sequence[AuditedImage]], likely_classes: Mapping[str, str] | None = None
    ) -> list[list[dict[str, str]]]:
        """Groups of images, for the template; see `Finding` for `likely_classes`."""
        return [[self._figure(image, (likely_classes or {}).get(image.path)) for image in group] for group in groups]

    def _figure(self, image: AuditedImage, likely: str | None) -> dict[str, str]:
        return {
            "path": printable(image.path),
            "link": link_to(image.path, self.folder),
            "split": image.split,
            "class_name": printable(
                f"{image.class_name}, perhaps {likely}" if likely is not None else image.class_name
            ),
            "error": printable(image.fingerprint.error),
            "preview": self.previews.get(image.path, ""),
        }


def _render(
    images: AuditedImages,
    samples: Mapping[str, Sequence[AuditedImage]],
    figures: Figures,
    unlisted: Collection[str],
    **content: Any,
) -> str:
    return render_page(
        Path(__file__).with_name("audit_page.html"),
        images=len(images) - len(unlisted),
        splits=SPLITS,
        classes=_class_rows(images, unlisted),
        samples=list(zip(map(printable, samples), figures.of(samples.values()), strict=True)),
        max_groups=MAX_GROUPS,
        max_images=MAX_IMAGES,
        max_open=MAX_OPEN,
        **content,
    )


def choose_samples(images: AuditedImages, unlisted: Collection[str] = ()) -> dict[str, list[AuditedImage]]:
    """For as many classes as the page shows, random images of each but the `unlisted` paths: the choice depends on the
    path only, so it hardly changes when images are added."""
    by_class: dict[int, list[int]] = defaultdict(list)
    for i, (path, class_id) in enumerate(zip(images.paths, images.class_ids.tolist(), strict=True)):
        if i not in images.prints.errors and path not in unlisted:
            by_class[class_id].append(i)
    most = min(MAX_SAMPLES_PER_CLASS, max(1, MAX_SAMPLES // max(1, len(by_class))))
    samples = {}
    for class_id, members in islice(by_class.items(), MAX_SAMPLES):
        chosen = nsmallest(most, members, key=lambda i: hashlib.sha256(os.fsencode(images.paths[i])).digest())
        samples[images.class_names[class_id]] = sorted(images.pick(chosen), key=lambda image: image.path)
    return samples


def make_previews(images: Iterable[AuditedImage], fingerprints: Fingerprints) -> dict[str, str]:
    """Path -> preview, a JPEG in base64, of the first readable images that the page has room for."""
    paths = list(dict.fromkeys(image.path for image in images if not image.fingerprint.error))[:MAX_PREVIEWS]
    previews = zip(paths, map_parallel(fingerprints.preview, paths, "previews"), strict=True)
    return {path: base64.b64encode(preview).decode() for path, preview in previews if preview}


def _class_rows(images: AuditedImages, unlisted: Collection[str]) -> list[dict[str, Any]]:
    listed = np.array([path not in unlisted for path in images.paths], bool)
    class_ids = images.class_ids[listed]
    counts = np.zeros((len(images.class_names), len(SPLITS)), np.int64)
    np.add.at(counts, (class_ids, images.splits[listed]), 1)
    largest = counts.sum(axis=1).max(initial=1)
    _, first = np.unique(class_ids, return_index=True)
    return [
        {
            "name": printable(images.class_names[k]),
            "counts": counts[k].tolist(),
            "part": float(counts[k].sum() / largest),
        }
        for k in class_ids[np.sort(first)]
    ]


def _described(image: AuditedImage, finding: Finding) -> str:
    likely = finding.likely_classes.get(image.path)
    return printable(image.path if likely is None else f"{image.path} (perhaps {likely})")


def _as_dict(finding: Finding) -> dict[str, Any]:
    likely = finding.likely_classes
    return {
        "kind": finding.kind,
        "message": finding.message,
        "groups": [
            [
                {"path": image.path, "split": image.split, "class": image.class_name}
                | ({"likely_class": likely[image.path]} if image.path in likely else {})
                for image in group
            ]
            for group in finding.groups
        ],
        "excluded": [image.path for image in finding.excluded],
    }
