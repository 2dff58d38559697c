"""What a classifier says of one image, and how that is told: to people, and to programs."""

from __future__ import annotations

import csv
import io
import json
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from utils.inference.rejection import UNKNOWN, Rejection
from utils.system.text import printable


@dataclass(frozen=True)
class Prediction:
    """What a classifier says of one image.

    Attributes:
        path: the file; empty for an image that was in memory.
        label: the likeliest class, or "unknown" if the answer is rejected.
        probability: of the likeliest class, 0 to 1.
        classes: the likeliest classes with their probabilities, best first, as many as were asked for.
        reason: why the answer is rejected; empty if it isn't.
    """

    path: str
    label: str
    probability: float
    classes: tuple[tuple[str, float], ...]
    reason: str = ""

    @property
    def rejected(self) -> bool:
        """Whether the label is "unknown"."""
        return bool(self.reason)


@dataclass(frozen=True)
class Failure:
    """An image without an answer: it can't be read, or the network's output isn't finite.

    Attributes:
        path: the file.
        error: what is wrong, and the file's name.
    """

    path: str
    error: str


Answer = Prediction | Failure


def make_prediction(
    path: str, classes: tuple[tuple[str, float], ...], rejection: Rejection | None, distance: float = 0.0
) -> Prediction:
    """The answer whose likeliest classes are these, best first, rejected where `rejection` says so; `distance`, in
    degrees, is to the nearest class."""
    name, probability = classes[0]
    reason = rejection.reason(probability, distance) if rejection else ""
    return Prediction(path, UNKNOWN if reason else name, probability, classes, reason)


def to_json(answer: Answer) -> str:
    """The line that `predict.py --json` prints."""
    content: dict[str, Any] = {"path": answer.path}
    if isinstance(answer, Failure):
        return json.dumps(content | {"error": answer.error})
    content["label"] = answer.label
    if answer.rejected:
        content["reason"] = answer.reason
    content["predictions"] = [{"class": name, "probability": p} for name, p in answer.classes]
    return json.dumps(content, allow_nan=False)


def csv_header(top_k: int) -> str:
    """The line that `predict.py --csv` begins with."""
    return _csv_line(
        ["path", "label", *(f"{what}_{k}" for k in range(1, top_k + 1) for what in ("class", "probability")), "note"]
    )


def to_csv(answer: Answer, top_k: int) -> str:
    """A line for each image; `note` says why it was rejected, or why it can't be read."""
    cells: list[str] = [""] * (2 * top_k)
    if isinstance(answer, Failure):
        return _csv_line([answer.path, "", *cells, answer.error])
    told = [cell for name, p in answer.classes for cell in (name, f"{p:.6f}")]
    return _csv_line([answer.path, answer.label, *told, *cells[len(told) :], answer.reason])


def _csv_line(cells: Sequence[str]) -> str:
    file = io.StringIO()
    csv.writer(file, lineterminator="\n").writerow(cells)
    return file.getvalue()[:-1]


def to_line(answer: Answer) -> str:
    """A line for people and for grep: path, label and probability, then the next classes."""
    if isinstance(answer, Failure):
        return printable(f"{answer.path}: error: {answer.error}")
    best, *others = (f"{name} {p:.1%}" for name, p in answer.classes)
    if answer.rejected:
        return printable(f"{answer.path}: {UNKNOWN}, {answer.reason}  (else {', '.join([best, *others])})")
    return printable(f"{answer.path}: {best}" + (f"  ({', '.join(others)})" if others else ""))


def to_bars(answer: Answer, width: int) -> str:
    """An image's likeliest classes as bars, no wider than a terminal of `width`."""
    if isinstance(answer, Failure):
        return to_line(answer)
    title = answer.path if not answer.rejected else f"{answer.path}: {UNKNOWN}, {answer.reason}"
    names = [shorten(printable(name), width // 3) for name, _ in answer.classes]
    longest = max(map(display_width, names))
    room = max(4, width - longest - 12)
    lines = [shorten(printable(title), width) if not answer.rejected else printable(title)]
    for name, (_, p) in zip(names, answer.classes, strict=True):
        bar = "█" * round(p * room)
        lines.append(f"  {pad(name, longest)} {p:>6.1%} {bar or '▏'}")
    return "\n".join(lines)


def to_row(answer: Answer, width: int, label_width: int) -> str:
    """An image as a row of a table, no wider than a terminal of `width`, of 40 and more: class, probability with its
    bar, or "unknown?" if the answer is rejected, path."""
    if isinstance(answer, Failure):
        return shorten(f"{pad('-', label_width)}  no answer    {printable(answer.error)}", width)
    name, p = (answer.label, answer.probability) if not answer.rejected else answer.classes[0]
    label = pad(shorten(printable(name), label_width), label_width)
    bar = UNKNOWN + "?" if answer.rejected else "█" * round(8 * p)
    start = f"{label}  {p:>6.1%} {bar:<8}  "
    room = max(8, width - display_width(start))
    return start + shorten(printable(answer.path), room, keep_end=True)


def display_width(text: str) -> int:
    """Columns that a terminal gives `text`: two for the signs of Chinese, Japanese and Korean."""
    return sum(_columns(sign) for sign in text)


def _columns(sign: str) -> int:
    if unicodedata.combining(sign):
        return 0
    return 2 if unicodedata.east_asian_width(sign) in "WF" else 1


def shorten(text: str, width: int, keep_end: bool = False) -> str:
    """`text` in no more than `width` columns, with … for what is left out: its end, or its beginning."""
    if display_width(text) <= width:
        return text
    signs = reversed(text) if keep_end else text
    kept, used = [], 1
    for sign in signs:
        used += _columns(sign)
        if used > width:
            break
        kept.append(sign)
    return "…" + "".join(reversed(kept)) if keep_end else "".join(kept) + "…"


def pad(text: str, width: int) -> str:
    """`text` with spaces up to `width` columns."""
    return text + " " * (width - display_width(text))
