"""What `predict.py` leaves in folders: pictures with their label below, and copies sorted by class."""

from __future__ import annotations

import filecmp
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from PIL import Image, ImageDraw

from utils.cli import printable
from utils.prediction import Prediction

LEAST_SIDE = 224
"""Tiny pictures are enlarged to this many pixels, so that a label can be read."""


def save_labelled(image: Image.Image, prediction: Prediction, folder: Path, maps: Sequence[Image.Image] = ()) -> Path:
    """Save `image` in `folder` with its label in a bar below it, and beside it `maps` of what the network looked at.

    A name that is taken gets a number, so that nothing is overwritten.

    Returns:
        The file.
    """
    from utils.fonts import label_font  # brings matplotlib, which nothing else here needs

    folder.mkdir(parents=True, exist_ok=True)
    scale = max(1, -(-LEAST_SIDE // min(image.size)))
    image = image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)
    beside = [m.resize((max(1, round(m.width * image.height / m.height)), image.height)) for m in maps]
    size = max(14, image.width // 24)
    width = image.width + sum(m.width for m in beside)
    sheet = Image.new("RGB", (width, image.height + 2 * size))
    left = 0
    for part in (image, *beside):
        sheet.paste(part, (left, 0))
        left += part.width
    label = printable(f"{prediction.label}  {prediction.probability:.1%}")
    font = label_font(label, size, width - size)
    ImageDraw.Draw(sheet).text((size // 2, image.height + size), label, "white", font, anchor="lm")
    while True:
        target = free_name(folder, Path(prediction.path).stem, ".png")
        try:
            with target.open("xb") as file:
                sheet.save(file, "PNG")
            return target
        except FileExistsError:  # another process took it meanwhile
            continue


def copy_into(prediction: Prediction, folder: Path) -> Path:
    """Copy a picture into the folder of its label in `folder`.

    What has its name there already stays: if it is the same file, nothing is done, else the copy gets a number.

    Returns:
        The copy.
    """
    source = Path(prediction.path)
    place = folder / folder_name(prediction.label)
    place.mkdir(parents=True, exist_ok=True)
    for target in _names(place, source.stem, source.suffix):
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
        shutil.copystat(source, target)
        return target
    raise AssertionError("names never end")


def free_name(folder: Path, stem: str, suffix: str) -> Path:
    """A name in `folder` that isn't taken."""
    return next(target for target in _names(folder, stem, suffix) if not target.exists())


def _names(folder: Path, stem: str, suffix: str) -> Iterator[Path]:
    number = 1
    while True:
        yield folder / (f"{stem}{suffix}" if number == 1 else f"{stem}_{number}{suffix}")
        number += 1


def folder_name(label: str) -> str:
    """A class name as the name of one folder, whatever a checkpoint calls it: nothing in it leads elsewhere."""
    name = re.sub(r'[/\\:*?"<>|\x00-\x1f]', "_", label).strip(". ") or "_"
    while len(os.fsencode(name)) > 255:
        name = name[:-1]
    return name
