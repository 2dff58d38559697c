"""Name what is in pictures: `python predict.py PATH ...`, see `--help`."""

from __future__ import annotations

import glob
import json
import os
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Annotated

import torch
import tyro
from PIL import Image, ImageDraw
from torch import Tensor

from utils import cli
from utils.checkpoint import find_checkpoint
from utils.classifier import Classifier, load_classifier
from utils.config import Device
from utils.images import ImageError, open_image
from utils.parallel import map_ahead
from utils.scan import is_demo, pictures_below

BATCH = 32


def main(
    paths: tyro.conf.Positional[tuple[str, ...]] = (),
    model_path: str = "",
    top_k: int = 3,
    json_lines: Annotated[bool, tyro.conf.arg(name="json")] = False,
    save: str = "",
    device: Device = "auto",
) -> int:
    """Name what is in pictures.

    Args:
        paths: files, folders (with all below them) and globs; none: ask for one after the other.
        model_path: a checkpoint or a run's folder; empty: the best of the newest run in logs/.
        top_k: how many classes to give.
        json_lines: print one JSON object a line, with path and predictions, or error.
        save: folder that gets the pictures with their labels written on them.
        device: auto, cuda, cpu or mps.

    Returns:
        The exit status: 1 if a picture couldn't be read.
    """
    if top_k < 1:
        raise ValueError(f"top_k={top_k}: give a whole number from 1 up")
    if save and Path(save).exists() and not Path(save).is_dir():
        raise ValueError(f"save={save!r}: it is a file; give a folder")
    checkpoint = find_checkpoint(model_path)
    classifier = load_classifier(checkpoint, device)
    print(f"checkpoint {checkpoint}", file=sys.stderr)
    failures = 0
    # Asked for one by one, pictures are answered one by one; else the next are read while the network is at work.
    batch_size, ahead = (BATCH, 2 * BATCH) if paths else (1, 1)
    pictures = map_ahead(partial(load, classifier), expand(paths or ask()), ahead)
    while batch := list(islice(pictures, batch_size)):
        for path, answer in predict_batch(classifier, batch, top_k):
            print(json.dumps({"path": path} | answer) if json_lines else format_answer(path, answer), flush=True)
            failures += "error" in answer
            if save and "predictions" in answer:
                image = open_image(path, classifier.preprocessing.max_pixels, classifier.preprocessing.allow_truncated)
                save_labelled(image, answer["predictions"][0], Path(path).name, Path(save))
    return 1 if failures else 0


def expand(paths: Iterable[str]) -> Iterator[str]:
    """Files as they are, the pictures in folders and below, and what globs match, sorted.

    The built-in digits are passed over in a folder that has other pictures. A path that is none of these, and a folder
    without pictures, come out as they are: reading them gives the error.
    """
    for path in paths:
        matches = [path] if os.path.exists(path) else sorted(glob.glob(path, recursive=True)) or [path]
        for match in matches:
            if os.path.isdir(match):
                found = pictures_below(match, Counter())
                yield from [path for path in found if not is_demo(path)] or found or [match]
            else:
                yield match


def ask() -> Iterator[str]:
    """Paths typed in, until the input ends or a line is empty; quotes around one are taken off."""
    while True:
        print("picture (empty line to leave): ", end="", file=sys.stderr, flush=True)
        path = sys.stdin.readline().strip()
        if not path:
            return
        yield path[1:-1] if path[0] == path[-1] and path[0] in "'\"" and len(path) > 2 else path


def load(classifier: Classifier, path: str) -> tuple[str, Tensor | ImageError]:
    """The path, and the picture as the network wants it or why it can't be read."""
    try:
        return path, classifier.load(path)
    except ImageError as error:
        return path, error


def predict_batch(
    classifier: Classifier, pictures: Sequence[tuple[str, Tensor | ImageError]], top_k: int
) -> Iterator[tuple[str, dict]]:
    """For each of what `load` gave, in order: the path, and `predictions` or `error` as `--json` prints them."""
    readable = [pixels for _, pixels in pictures if isinstance(pixels, Tensor)]
    ranked = iter(())
    if readable:
        values, ids = classifier.probabilities(torch.stack(readable)).topk(min(top_k, len(classifier.class_names)))
        ranked = zip(values.tolist(), ids.tolist(), strict=True)
    for path, pixels in pictures:
        if isinstance(pixels, ImageError):
            yield path, {"error": str(pixels)}
        else:
            best = zip(*next(ranked), strict=True)
            yield path, {"predictions": [{"class": classifier.class_names[k], "probability": p} for p, k in best]}


def format_answer(path: str, answer: dict) -> str:
    """A line for people: path, label and probability, then the next classes."""
    if "error" in answer:
        return f"{path}: error: {answer['error']}"
    best, *others = (f"{row['class']} {row['probability']:.1%}" for row in answer["predictions"])
    return f"{path}: {best}" + (f"  ({', '.join(others)})" if others else "")


def save_labelled(image: Image.Image, prediction: dict, name: str, folder: Path) -> None:
    """Save `image` in `folder` with its label in a bar below it; tiny pictures are enlarged so that it can be read.

    A name that is taken gets a number, so that nothing is overwritten.
    """
    from utils.fonts import label_font  # brings matplotlib, which nothing else here needs

    folder.mkdir(parents=True, exist_ok=True)
    scale = max(1, -(-224 // min(image.size)))
    image = image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)
    size = max(14, image.width // 24)
    bar = Image.new("RGB", (image.width, image.height + 2 * size))
    bar.paste(image)
    label = cli.printable(f"{prediction['class']}  {prediction['probability']:.1%}")
    font = label_font(label, size, image.width - size)
    ImageDraw.Draw(bar).text((size // 2, image.height + size), label, "white", font, anchor="lm")
    stem, number = Path(name).stem, 1
    while (target := folder / (f"{stem}.png" if number == 1 else f"{stem}_{number}.png")).exists():
        number += 1
    bar.save(target)


if __name__ == "__main__":
    sys.exit(cli.run(main))
