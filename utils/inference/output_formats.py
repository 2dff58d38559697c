"""Predictions as text: JSON and CSV for programs; lines, table rows and bars for people."""

from __future__ import annotations

import json
from typing import Any

from utils.inference.prediction import Failure, Prediction
from utils.inference.rejection import UNKNOWN
from utils.system.csv_text import csv_row
from utils.system.text import display_width, pad, printable, shorten


def to_json(result: Prediction | Failure) -> str:
    """A line of `predict.py --json`."""
    content: dict[str, Any] = {"path": result.path}
    if isinstance(result, Failure):
        content["error"] = result.error
    else:
        content["label"] = result.label
        if result.rejected:
            content["reason"] = result.reason
        content["predictions"] = [{"class": name, "probability": p} for name, p in result.classes]
    return json.dumps(content, allow_nan=False).replace("\x7f", "\\u007f")  # the one control character that it leaves


def from_json(line: str) -> Prediction | Failure:
    """The result that `to_json` gives this line for.

    Raises:
        ValueError: there is none.
    """
    try:
        content = json.loads(line)
        if "error" in content:
            result = Failure(content["path"], content["error"])
            texts, probabilities = [result.path, result.error], []
        else:
            classes = tuple((row["class"], row["probability"]) for row in content["predictions"])
            result = Prediction(content["path"], content["label"], classes[0][1], classes, content.get("reason", ""))
            texts, probabilities = [result.path, result.label, result.reason, *dict(classes)], [p for _, p in classes]
        if (
            all(type(x) is str for x in texts)
            and all(type(p) is float for p in probabilities)
            and to_json(result) == line
        ):
            return result
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError):
        pass
    raise ValueError(f"{line[:80]!r} is no prediction")


def csv_header(top_k: int) -> str:
    """The first line of `predict.py --csv`."""
    columns = [f"{column}_{k}" for k in range(1, top_k + 1) for column in ("class", "probability")]
    return csv_row(["path", "label", *columns, "note"])


def to_csv(result: Prediction | Failure, top_k: int) -> str:
    """A row of `predict.py --csv`; `note` is why the prediction is rejected, or why the image can't be read."""
    empty = [""] * (2 * top_k)
    if isinstance(result, Failure):
        return csv_row([result.path, "", *empty, result.error])
    cells = [cell for name, p in result.classes for cell in (name, f"{p:.6f}")]
    return csv_row([result.path, result.label, *cells, *empty[len(cells) :], result.reason])


def to_line(result: Prediction | Failure) -> str:
    """A line with path, label, probability and the next classes."""
    if isinstance(result, Failure):
        return printable(f"{result.path}: error: {result.error}")
    best, *others = (f"{name} {p:.1%}" for name, p in result.classes)
    if result.rejected:
        return printable(f"{result.path}: {UNKNOWN}, {result.reason}  (most likely: {', '.join([best, *others])})")
    return printable(f"{result.path}: {best}" + (f"  ({', '.join(others)})" if others else ""))


def to_bars(result: Prediction | Failure, width: int) -> str:
    """The most probable classes as bars, for a terminal of `width` columns."""
    if isinstance(result, Failure):
        return to_line(result)
    if result.rejected:
        title = printable(f"{result.path}: {UNKNOWN}, {result.reason}")
    else:
        title = shorten(printable(result.path), width)
    names = [shorten(printable(name), width // 3) for name, _ in result.classes]
    name_width = max(map(display_width, names))
    max_length = max(4, width - name_width - 12)
    bars = ["█" * round(p * max_length) or "▏" for _, p in result.classes]
    rows = zip(names, result.classes, bars, strict=True)
    return "\n".join([title, *(f"  {pad(name, name_width)} {p:>6.1%} {bar}" for name, (_, p), bar in rows)])


def to_row(result: Prediction | Failure, width: int, label_width: int) -> str:
    """A table row for a terminal of `width` columns, at least 40: class, probability, bar, path.

    For a rejected prediction, "unknown?" replaces the bar.
    """
    if isinstance(result, Failure):
        return shorten(f"{pad('-', label_width)}  no result    {printable(result.error)}", width)
    name, p = result.classes[0]
    label = pad(shorten(printable(name), label_width), label_width)
    bar = UNKNOWN + "?" if result.rejected else "█" * round(8 * p)
    start = f"{label}  {p:>6.1%} {bar:<8}  "
    return start + shorten(printable(result.path), max(8, width - display_width(start)), keep_end=True)
