"""Report audit findings: in the terminal, as audit.json, and as a page of thumbnails."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2

from utils.annotation.audit import AuditedImage, Finding
from utils.annotation.fingerprints import Fingerprints
from utils.system.files import make_folder, write_json, write_text
from utils.system.text import printable

MAX_PRINTED = 3
"""Groups per finding, and images per group, printed in the terminal."""
MAX_GROUPS, MAX_IMAGES = 12, 6
"""Groups per finding, and images per group, on the page."""


def format_findings(findings: Sequence[Finding], folder: str | Path, fix: bool) -> str:
    """Format findings for the terminal, with some paths of each.

    Args:
        findings: from `utils.annotation.audit.audit_images`.
        folder: the folder of the reports.
        fix: whether images were excluded from the lists.
    """
    if not findings:
        return "audit: no problems found"
    width = max(len(finding.kind) for finding in findings)
    lines = []
    for finding in findings:
        lines.append(f"  {finding.kind:<{width}}  {finding.message}")
        for group in finding.groups[:MAX_PRINTED]:
            lines.append(f"  {'':<{width}}    {', '.join(image.path for image in group[:MAX_PRINTED])}")
    lines.append(f"  full report: {folder}/audit.html, {folder}/audit.json")
    if not fix and any(finding.excluded for finding in findings):
        lines.append("  run the same command with --fix to exclude faulty images from the lists; no file is changed")
    return "\n".join(["audit:", *lines])


def write_audit(
    folder: str | Path, findings: Sequence[Finding], images: Sequence[AuditedImage], fingerprints: Fingerprints
) -> None:
    """Write `audit.json` with all paths, and `audit.html` with thumbnails of the first groups of each finding."""
    folder = Path(folder)
    make_folder(folder)
    content = {"images": len(images), "findings": [_as_dict(finding) for finding in findings]}
    write_json(folder / "audit.json", content)
    template = Path(__file__).with_name("audit_page.html").read_text(encoding="utf-8")
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    page_findings = [_for_page(finding, fingerprints) for finding in findings]
    page = environment.from_string(template).render(images=len(images), findings=page_findings)
    write_text(folder / "audit.html", page)


def _as_dict(finding: Finding) -> dict[str, Any]:
    return {
        "kind": finding.kind,
        "message": finding.message,
        "groups": [
            [{"path": p.path, "split": p.split, "class": p.class_name} for p in group] for group in finding.groups
        ],
        "excluded": [image.path for image in finding.excluded],
    }


def _for_page(finding: Finding, fingerprints: Fingerprints) -> dict[str, Any]:
    groups = [
        {
            "images": [_figure(image, fingerprints) for image in group[:MAX_IMAGES]],
            "more": max(0, len(group) - MAX_IMAGES),
        }
        for group in finding.groups[:MAX_GROUPS]
    ]
    return {
        "kind": finding.kind,
        "message": printable(finding.message),
        "excluded": len(finding.excluded),
        "groups": groups,
        "more": max(0, len(finding.groups) - MAX_GROUPS),
    }


def _figure(image: AuditedImage, fingerprints: Fingerprints) -> dict[str, str]:
    preview = None if image.fingerprint.error else fingerprints.preview(image.path)
    return {
        "path": printable(image.path),
        "split": image.split,
        "class_name": printable(image.class_name),
        "error": printable(image.fingerprint.error),
        "preview": base64.b64encode(preview).decode() if preview else "",
    }
