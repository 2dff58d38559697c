"""What the audit found, for the terminal, for programs, and as a page of thumbnails."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2

from utils.annotation.audit import AuditedImage, Finding
from utils.annotation.fingerprints import Fingerprints
from utils.system.files import write_json, write_text
from utils.system.text import printable

NAMED = 3
"""Images of a finding that the terminal names."""
GROUPS_SHOWN, IMAGES_SHOWN = 12, 6
"""Groups of a finding, and images of a group, that the page shows."""


def format_findings(findings: Sequence[Finding], folder: str | Path, fix: bool) -> str:
    """A line a finding, with some names, and where all is written; one line that nothing is wrong where that is so.

    Args:
        findings: from `utils.annotation.audit.find_faults`.
        folder: where `write_audit` wrote.
        fix: whether what can be left out of the lists was left out.
    """
    if not findings:
        return "audit: nothing wrong was found"
    width = max(len(finding.kind) for finding in findings)
    lines = []
    for finding in findings:
        lines.append(f"  {finding.kind:<{width}}  {finding.message}")
        for group in finding.groups[:NAMED]:
            lines.append(f"  {'':<{width}}    {', '.join(image.path for image in group[:NAMED])}")
    lines.append(f"  all of it: {folder}/audit.html, {folder}/audit.json")
    if not fix and any(finding.excluded for finding in findings):
        lines.append("  the same command with --fix makes lists without the faulty ones; no file is touched")
    return "\n".join(["audit:", *lines])


def write_audit(
    folder: str | Path, findings: Sequence[Finding], images: Sequence[AuditedImage], fingerprints: Fingerprints
) -> None:
    """Write `audit.json`, with every file name, and `audit.html`, with thumbnails of the first of each kind."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    content = {"images": len(images), "findings": [_as_dict(finding) for finding in findings]}
    write_json(folder / "audit.json", content)
    template = Path(__file__).with_name("audit_page.html").read_text(encoding="utf-8")
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    shown = [_for_page(finding, fingerprints) for finding in findings]
    page = environment.from_string(template).render(images=len(images), findings=shown)
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
            "images": [_figure(image, fingerprints) for image in group[:IMAGES_SHOWN]],
            "more": max(0, len(group) - IMAGES_SHOWN),
        }
        for group in finding.groups[:GROUPS_SHOWN]
    ]
    return {
        "kind": finding.kind,
        "message": printable(finding.message),
        "excluded": len(finding.excluded),
        "groups": groups,
        "more": max(0, len(finding.groups) - GROUPS_SHOWN),
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
