"""HTML pages that work without a server: templates that share one look."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any
from urllib.parse import quote

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


def link_to(path: str, folder: Path) -> str:
    """The URL of a file, relative to a page in `folder`, so that both can be moved together."""
    try:
        relative = Path(os.path.relpath(path, folder)).as_posix()
    except ValueError:  # on Windows the file may be on another drive
        return Path(path).absolute().as_uri()
    return quote(os.fsencode(relative))
