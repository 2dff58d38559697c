"""What `predict.py` leaves in folders: images with their label below, and copies sorted by class."""

from __future__ import annotations

import filecmp
import itertools
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from PIL import Image, ImageDraw

from utils.inference.prediction import Prediction
from utils.system.text import printable

MIN_SIDE = 224
"""Tiny images are enlarged to this many pixels, so that a label can be read;"""
MOST_SIDE = 2048
"""large ones are shrunk to this many."""

MAX_BYTES = 240
"""Of a file's name, so that a number still fits."""
RESERVED = {"CON", "PRN", "AUX", "NUL", *(f"{port}{number}" for port in ("COM", "LPT") for number in range(10))}
"""What no file can be called on Windows."""


def save_labelled(
    image: Image.Image, prediction: Prediction, folder: Path, maps: Mapping[str, Image.Image] | None = None
) -> Path:
    """Save `image` in `folder` with its label in a bar below it, and beside it `maps` with their titles.

    A name that is taken gets a number, so that nothing is overwritten.

    Returns:
        The file.
    """
    folder.mkdir(parents=True, exist_ok=True)
    image = _readable(image)
    label = printable(f"{prediction.label}  {prediction.probability:.1%}")
    sheet = _side_by_side({label: image} | dict(maps or {}))
    for name in _numbered(Path(prediction.path).stem):
        target = folder / f"{name}.png"
        try:
            with target.open("xb") as file:
                sheet.save(file, "PNG")
        except FileExistsError:
            continue
        return target
    raise AssertionError("names never end")


def _readable(image: Image.Image) -> Image.Image:
    """An image at a size at which a label can be read."""
    if max(image.size) > MOST_SIDE:
        image = image.copy()
        image.thumbnail((MOST_SIDE, MOST_SIDE))
    scale = max(1, min(-(-MIN_SIDE // min(image.size)), MOST_SIDE // max(image.size)))
    return image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)


def _side_by_side(images: Mapping[str, Image.Image]) -> Image.Image:
    """Images, as high as the first, each with its title in a bar below."""
    from utils.system.fonts import label_font  # brings matplotlib, which nothing else here needs

    (first, *_) = images.values()
    size = max(14, first.width // 24)
    parts = {
        title: part.resize((max(1, round(part.width * first.height / part.height)), first.height))
        for title, part in images.items()
    }
    sheet = Image.new("RGB", (sum(part.width for part in parts.values()), first.height + 2 * size))
    left = 0
    for title, part in parts.items():
        sheet.paste(part, (left, 0))
        font = label_font(title, size, part.width - size)
        ImageDraw.Draw(sheet).text((left + size // 2, first.height + size), title, "white", font, anchor="lm")
        left += part.width
    return sheet


def copy_into(path: str, folder: Path) -> Path:
    """Copy a file into a folder.

    What has its name there already stays: if it is the same file, nothing is done, else the copy gets a number.

    Returns:
        The copy.
    """
    source = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    for name in _numbered(source.stem):
        target = folder / f"{name}{source.suffix}"
        if target.exists():
            if target.is_file() and filecmp.cmp(source, target, shallow=False):
                return target
            continue
        try:
            with source.open("rb") as original, target.open("xb") as copy:
                shutil.copyfileobj(original, copy)
        except FileExistsError:
            continue
        except BaseException:
            target.unlink(missing_ok=True)  # no half copy
            raise
        with suppress(OSError):  # sticks and network shares may refuse times and permissions
            shutil.copystat(source, target)
        return target
    raise AssertionError("names never end")


def _numbered(name: str) -> Iterator[str]:
    """The name, then the name with 2, 3 and so on."""
    yield name
    yield from (f"{name}_{number}" for number in itertools.count(2))


def folder_names(labels: Sequence[str]) -> dict[str, str]:
    """Labels as names of folders, whatever a checkpoint calls its classes: nothing in a name leads elsewhere, each is a
    name on any system, and no two are taken for one another."""
    names: dict[str, str] = {}
    taken: set[str] = set()
    for label in dict.fromkeys(labels):
        plain = re.sub(r'[/\\:*?"<>|\x00-\x1f]', "_", label).strip(". ") or "_"
        if plain.partition(".")[0].upper() in RESERVED:
            plain = f"_{plain}"
        plain = plain[:MAX_BYTES]
        while len(os.fsencode(plain)) > MAX_BYTES:
            plain = plain[:-1]
        names[label] = next(name for name in _numbered(plain) if name.casefold() not in taken)
        taken.add(names[label].casefold())
    return names
