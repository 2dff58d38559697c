"""HTML pages that work without a server: templates that share one look."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from utils.system.text import count_of


def render_page(template: Path, **content: Any) -> str:
    """A template filled with `content`, which is escaped. It can include `page_style.css` and `page_scroll.js` of this
    package, and has the filters `percent` and `count_of`."""
    import jinja2  # slow to import

    loader = jinja2.FileSystemLoader([template.parent, Path(__file__).parent])
    environment = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters["count_of"] = count_of
    environment.filters["percent"] = lambda value: "–" if value is None else f"{value:.1%}"
    return environment.get_template(template.name).render(**content)
