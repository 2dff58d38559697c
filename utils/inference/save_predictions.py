"""Write the output folders of predict.py: labeled images, and copies sorted by class."""

from __future__ import annotations

import filecmp
import itertools
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from PIL import Image, ImageDraw
from tqdm import tqdm

from utils.data.image_io import ImageError, open_image
from utils.inference.classifier import Classifier
from utils.inference.prediction import Prediction
from utils.inference.predictor import Predictor
from utils.inference.rejection import UNKNOWN
from utils.system.files import WriteError, make_folder
from utils.system.text import printable

MIN_SIDE = 224
MAX_SIDE = 2048
"""Labeled images are scaled to between these sides in pixels, so that labels are readable and files small."""

MAX_BYTES = 255
"""The longest name of a file or folder that file systems allow, in bytes."""


def choose_copies(
    model: Predictor, save: str, explain: bool, sort_into: str
) -> dict[str, Callable[[Prediction], object]]:
    """The functions that write images to the output folders, by folder."""
    folders = folder_names([*model.class_names, UNKNOWN])
    copies: dict[str, Callable[[Prediction], object]] = {}
    if save:
        copies[save] = lambda result: save_image(model, result, Path(save), explain)
    if sort_into:
        copies[sort_into] = lambda result: copy_into(result.path, Path(sort_into, folders[result.label]))
    return copies


def copy_result(result: Prediction, copies: Mapping[str, Callable[[Prediction], object]]) -> Iterator[str]:
    """Write an image to the output folders; yield those that it is written to."""
    for folder, write in copies.items():
        try:
            write(result)
            yield folder
        except (ImageError, OSError) as error:
            tqdm.write(f"error: {result.path} isn't written to {folder}/: {error}", file=sys.stderr)


def save_image(model: Predictor, prediction: Prediction, folder: Path, explain: bool) -> None:
    """Save an image with its label and, with `explain`, with explanation maps."""
    image = open_image(prediction.path, model.preprocessing.max_pixels, model.preprocessing.allow_truncated)
    maps = {}
    if explain:
        from utils.inference.explain import explain_one  # slow to import

        assert isinstance(model, Classifier), "open_model rejects explain for other models"
        class_id = model.class_names.index(prediction.classes[0][0])
        maps = explain_one(model, model.load(prediction.path), class_id, MIN_SIDE)
    save_labeled(image, prediction, folder, maps)


def save_labeled(
    image: Image.Image, prediction: Prediction, folder: Path, maps: Mapping[str, Image.Image] | None = None
) -> Path:
    """Save `image` with its label in a bar below, and with `maps` (title -> image) on its right.

    If the file name exists, a number is appended, so that nothing is overwritten.

    Returns:
        The file.

    Raises:
        WriteError: it can't be written; no partial file is left.
    """
    label = printable(f"{prediction.label}  {prediction.probability:.1%}")
    sheet = _side_by_side({label: _scale(image)} | dict(maps or {}))
    return _write_new(folder, Path(prediction.path).stem, ".png", lambda file: sheet.save(file, "PNG"))


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

    Raises:
        OSError: the file can't be read, or (WriteError) the copy can't be written; no partial copy is left.
    """
    source = Path(path)
    for name in _numbered(source.stem, source.suffix):
        target = folder / name
        if not target.exists():
            break
        if target.is_file() and filecmp.cmp(source, target, shallow=False):
            return target
    with source.open("rb") as original:
        target = _write_new(folder, source.stem, source.suffix, lambda copy: shutil.copyfileobj(original, copy))
    with suppress(OSError):  # some USB drives and network shares don't support times and permissions
        shutil.copystat(source, target)
    return target


def _write_new(folder: Path, stem: str, suffix: str, write: Callable[[BinaryIO], object]) -> Path:
    """Write a file under the first free name; see `_numbered`."""
    make_folder(folder)
    for name in _numbered(stem, suffix):
        target = folder / name
        try:
            file = target.open("xb")
        except FileExistsError:
            continue
        except OSError as error:
            raise WriteError(error.errno, error.strerror, str(target)) from error
        try:
            with file:
                write(file)
        except BaseException as error:
            target.unlink(missing_ok=True)  # no partial file
            if isinstance(error, OSError):
                raise WriteError(error.errno, error.strerror, str(target)) from error
            raise
        return target
    raise AssertionError("_numbered is infinite")


def _numbered(stem: str, suffix: str = "") -> Iterator[str]:
    """Yield file names: stem and suffix, then with _2, _3 and so on in between; long stems are shortened."""
    for number in itertools.count(1):
        end = f"_{number}{suffix}" if number > 1 else suffix
        yield _shorten(stem, MAX_BYTES - len(os.fsencode(end))) + end


def _shorten(name: str, max_bytes: int) -> str:
    while len(os.fsencode(name)) > max_bytes:
        name = name[:-1]
    return name


def folder_names(labels: Sequence[str]) -> dict[str, str]:
    """Map each label to a valid, unique folder name that stays within its parent folder.

    Class names come from a checkpoint and may contain any characters.
    """
    names: dict[str, str] = {}
    used: set[str] = set()
    for label in dict.fromkeys(labels):
        name = re.sub(r'[/\\:*?"<>|\x00-\x1f]', "_", label).strip(". ") or "_"
        names[label] = next(candidate for candidate in _numbered(name) if candidate.casefold() not in used)
        used.add(names[label].casefold())
    return names
