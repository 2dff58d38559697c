"""The files of suggested images: a table, and a page of thumbnails by the template `suggestions_page.html`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from utils.data.preprocessing import Preprocessing
from utils.inference.prediction import Prediction
from utils.inference.suggestions import margin
from utils.inference.thumbnails import thumbnail_uri
from utils.system.csv_text import csv_row
from utils.system.files import write_text
from utils.system.pages import link_to, render_page
from utils.system.text import printable
from utils.system.thread_map import map_parallel

TABLE, PAGE = "suggestions.csv", "suggestions.html"
COLUMNS = ("path", "rank", "prediction", "probability", "margin")
MAX_PREVIEWS = 4000
"""Thumbnails on the page, about 5 kB each; further images have none."""


def write_suggestions(
    folder: Path, suggested: Sequence[Prediction], total: int, preprocessing: Preprocessing, commands: Sequence[str]
) -> None:
    """Write `TABLE` and `PAGE`.

    Args:
        folder: exists.
        suggested: by rank.
        total: the number of images that they were chosen from.
        preprocessing: how they are read.
        commands: what to do after labeling, for the page.
    """
    rows = [
        (image.path, rank, image.label, f"{image.probability:.6f}", f"{margin(image):.6f}")
        for rank, image in enumerate(suggested, 1)
    ]
    write_text(folder / TABLE, "".join(f"{csv_row(row)}\r\n" for row in (COLUMNS, *rows)))

    def thumbnail(path: str) -> str:
        return thumbnail_uri(path, preprocessing)

    previews = map_parallel(thumbnail, [image.path for image in suggested[:MAX_PREVIEWS]], "thumbnails")
    figures = [
        {
            "path": printable(image.path),
            "link": link_to(image.path, folder),
            "preview": next(previews, ""),
            "classes": [(printable(name), probability) for name, probability in image.classes],
        }
        for image in suggested
    ]
    template = Path(__file__).with_name("suggestions_page.html")
    page = render_page(template, figures=figures, total=total, table=TABLE, commands=list(map(printable, commands)))
    write_text(folder / PAGE, page)
