"""Write the output folders of predict.py: labeled images, and copies sorted by class."""

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
MAX_SIDE = 2048
"""Labeled images are scaled to between these sides in pixels, so that labels are readable and files small."""

MAX_BYTES = 240
"""The longest name of a folder, in bytes; file systems allow 255, and a number may be appended."""


def save_labeled(
    image: Image.Image, prediction: Prediction, folder: Path, maps: Mapping[str, Image.Image] | None = None
) -> Path:
    """Save `image` with its label in a bar below, and with `maps` (title -> image) on its right.

    If the file name exists, a number is appended, so that nothing is overwritten.

    Returns:
        The file.
    """
    folder.mkdir(parents=True, exist_ok=True)
    label = printable(f"{prediction.label}  {prediction.probability:.1%}")
    sheet = _side_by_side({label: _scale(image)} | dict(maps or {}))
    for name in _numbered(Path(prediction.path).stem):
        with suppress(FileExistsError), (folder / f"{name}.png").open("xb") as file:
            sheet.save(file, "PNG")
            return Path(file.name)
    raise AssertionError("_numbered is infinite")


def _scale(image: Image.Image) -> Image.Image:
    """Shrink or enlarge an image to sides between `MIN_SIDE` and `MAX_SIDE`."""
    if max(image.size) > MAX_SIDE:
        image = image.copy()
        image.thumbnail((MAX_SIDE, MAX_SIDE))
    scale = max(1, min(-(-MIN_SIDE // min(image.size)), MAX_SIDE // max(image.size)))
    return image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)


def _side_by_side(images: Mapping[str, Image.Image]) -> Image.Image:
    """Join images at the height of the first, each with its title in a bar below."""
    from utils.system.fonts import label_font  # imports matplotlib

    (first, *_) = images.values()
    font_size = max(14, first.width // 24)
    resized = {
        title: image.resize((max(1, round(image.width * first.height / image.height)), first.height))
        for title, image in images.items()
    }
    sheet = Image.new("RGB", (sum(image.width for image in resized.values()), first.height + 2 * font_size))
    left = 0
    for title, image in resized.items():
        sheet.paste(image, (left, 0))
        font = label_font(title, font_size, image.width - font_size)
        position = (left + font_size // 2, first.height + font_size)
        ImageDraw.Draw(sheet).text(position, title, "white", font, anchor="lm")
        left += image.width
    return sheet


def copy_into(path: str, folder: Path) -> Path:
    """Copy a file into a folder and return the copy.

    If the file name exists there with the same content, that file is returned; otherwise a number is appended.
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
            target.unlink(missing_ok=True)  # no partial copy
            raise
        with suppress(OSError):  # some USB drives and network shares don't support times and permissions
            shutil.copystat(source, target)
        return target
    raise AssertionError("_numbered is infinite")


def _numbered(name: str) -> Iterator[str]:
    """Yield name, name_2, name_3 and so on."""
    yield name
    yield from (f"{name}_{number}" for number in itertools.count(2))


def folder_names(labels: Sequence[str]) -> dict[str, str]:
    """Map each label to a valid, unique folder name that stays within its parent folder.

    Class names come from a checkpoint and may contain any characters.
    """
    names: dict[str, str] = {}
    used: set[str] = set()
    for label in dict.fromkeys(labels):
        name = re.sub(r'[/\\:*?"<>|\x00-\x1f]', "_", label).strip(". ") or "_"
        name = name[:MAX_BYTES]
        while len(os.fsencode(name)) > MAX_BYTES:
            name = name[:-1]
        names[label] = next(candidate for candidate in _numbered(name) if candidate.casefold() not in used)
        used.add(names[label].casefold())
    return names
