"""Name what is in images: `python predict.py PATH ...`, see `--help`."""

from __future__ import annotations

import codecs
import glob
import os
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Annotated

import tyro
from tqdm import tqdm

from nets.weights.pretrained import BUNDLED_WEIGHTS
from utils.annotation.folder_scan import find_images, is_demo
from utils.config.train_config import Device
from utils.data.image_io import open_image
from utils.inference.classifier import BATCH, WEIGHTS_SUFFIX, Classifier, load_classifier
from utils.inference.onnx_classifier import SUFFIX, OnnxClassifier, is_onnx, open_onnx
from utils.inference.prediction import (
    Answer,
    Failure,
    Prediction,
    csv_header,
    display_width,
    shorten,
    to_bars,
    to_csv,
    to_json,
    to_line,
    to_row,
)
from utils.inference.rejection import UNKNOWN, Rejection
from utils.inference.save_predictions import MIN_SIDE, copy_into, folder_names, save_labelled
from utils.runs.checkpoint import find_checkpoint
from utils.runs.folder import CONFIG_FILE
from utils.system import cli
from utils.system.text import printable

Model = Classifier | OnnxClassifier

EXPLAINED = "explained"
"""Where images go that are to be explained, if `--save` names no folder."""


def main(
    paths: tyro.conf.Positional[tuple[str, ...]] = (),
    model_path: str = "",
    top_k: int = 3,
    json_lines: Annotated[bool, tyro.conf.arg(name="json")] = False,
    csv_lines: Annotated[bool, tyro.conf.arg(name="csv")] = False,
    save: str = "",
    explain: bool = False,
    sort_into: str = "",
    reject_below: str = "",
    max_error: float = 0.05,
    tta: bool = False,
    raw: bool = False,
    device: Device = "auto",
) -> int:
    """Name what is in images.

    Args:
        paths: files, folders (with all below them) and globs; "-": paths from the standard input, one a line, many
            at a time; none: ask for one after the other. If the first is a file of export.py, it is the model.
        model_path: a checkpoint, a run's folder, a folder of runs, of which the newest counts, or an .onnx or
            .safetensors file of export.py; empty: logs/, before there is a run the network that comes with Thaw, for
            ten kinds of things.
        top_k: how many classes to give.
        json_lines: print one JSON object a line, with path, label and predictions, or error.
        csv_lines: print a table of comma-separated values.
        save: folder that gets the images with their labels written below them.
        explain: save them (in "explained" if save names no folder) with maps of what the network looked at beside them.
        sort_into: folder that gets a copy of each image in a folder named after its class; nothing is overwritten.
        reject_below: answer "unknown" where the probability is below this (0 to 1), or the image is unlike all
            classes. "auto": below what validation showed to be needed for max_error.
        max_error: with reject_below=auto, the part of the accepted answers that may be wrong.
        tta: average over several views of each image: five to ten times the time, sometimes a little better.
        raw: give probabilities as the network does, without the temperature fitted after training.
        device: auto, cuda, cpu or mps.

    Returns:
        The exit status: 1 if an image has no answer, mostly since it can't be read.
    """
    check(top_k, json_lines, csv_lines, save, sort_into)
    model_path, paths = choose_model(model_path, paths)
    classifier = open_model(model_path, device, raw, tta, explain, reject_below)
    rejection = choose_rejection(classifier, reject_below, max_error, tta)
    top_k = min(top_k, len(classifier.class_names))
    given = list(expand(paths)) if paths and "-" not in paths else None
    images = given if given is not None else expand(paths or ask_for_paths())
    format_answer = choose_format(classifier, json_lines, csv_lines, top_k, single=not paths or len(given or ()) == 1)
    if csv_lines:
        print(csv_header(top_k))
    save = save or (EXPLAINED if explain else "")
    folders = folder_names([*classifier.class_names, UNKNOWN])
    counts: Counter[str] = Counter()
    answers = classifier.stream(images, top_k, BATCH if paths else 1, tta, rejection)
    many = len(given) > BATCH if given is not None else bool(paths)
    with tqdm(total=len(given) if given else None, unit="image", leave=False, disable=None if many else True) as bar:
        for answer in answers:
            tqdm.write(format_answer(answer), file=sys.stdout)
            sys.stdout.flush()
            bar.update()
            if isinstance(answer, Failure):
                counts[""] += 1
                continue
            counts[answer.label] += 1
            if save:
                keep(classifier, answer, Path(save), explain)
            if sort_into:
                copy_into(answer.path, Path(sort_into, folders[answer.label]))
    if sum(counts.values()) > 1:
        print(summarise(counts), file=sys.stderr)
    for folder in filter(None, (save, sort_into)):
        print(f"written to {folder}/: {sum(counts.values()) - counts['']} images", file=sys.stderr)
    return 1 if counts[""] else 0


def check(top_k: int, json_lines: bool, csv_lines: bool, save: str, sort_into: str) -> None:
    """Raise a ValueError that names what can't work."""
    if top_k < 1:
        raise ValueError(f"top_k={top_k}: give a whole number from 1 up")
    if json_lines and csv_lines:
        raise ValueError("json and csv: choose one of them")
    cli.check_folder("save", save)
    cli.check_folder("sort_into", sort_into)


def choose_model(model_path: str, paths: tuple[str, ...]) -> tuple[str, tuple[str, ...]]:
    """Which model, and the paths of the images: an exported file among these, which comes first, is the model."""
    if not paths or not paths[0].lower().endswith((SUFFIX, WEIGHTS_SUFFIX)):
        return model_path, paths
    if model_path:
        raise ValueError(
            f"there are two models, {model_path} and {paths[0]}: leave model_path off, or give images only"
        )
    return paths[0], paths[1:]


def open_model(model_path: str, device: Device, raw: bool, tta: bool, explain: bool, reject_below: str) -> Model:
    """Open a checkpoint or an exported file, and say which.

    Raises:
        ValueError: something is asked of an exported file that takes a checkpoint.
    """
    if not is_onnx(model_path):
        checkpoint = find_model(model_path)
        print(f"checkpoint {checkpoint}", file=sys.stderr)
        return load_classifier(checkpoint, device, raw)
    asked = {
        "explain": explain,
        "raw": raw,
        "tta": tta,
        "reject_below=auto": reject_below == "auto",
        f"device={device}": device not in ("auto", "cpu"),
    }
    if wrong := [name for name, is_asked in asked.items() if is_asked]:
        raise ValueError(
            f"{', '.join(wrong)}: {model_path} is an exported file and can't; take its checkpoint for that"
        )
    print(f"exported file {model_path}", file=sys.stderr)
    return open_onnx(model_path)


def find_model(model_path: str) -> Path:
    """The checkpoint that `model_path` means; if it is empty and no run was ever begun, the network in the box.

    Raises:
        FileNotFoundError: there is none.
    """
    try:
        return find_checkpoint(model_path)
    except FileNotFoundError:
        if model_path or not BUNDLED_WEIGHTS.is_file():
            raise
        if any(Path("logs").glob(f"*/{CONFIG_FILE}")):
            raise FileNotFoundError(
                "no run in logs/ has a checkpoint yet: wait for the first epoch, or give --model-path"
            ) from None
        print("there is no run in logs/ yet, so the network that comes with Thaw answers", file=sys.stderr)
        return BUNDLED_WEIGHTS


def choose_rejection(classifier: Model, reject_below: str, max_error: float, tta: bool) -> Rejection | None:
    """Which answers to reject, and what that costs, which is printed; None: none.

    Raises:
        ValueError: it isn't "auto" or a number from 0 to 1, or "auto" can't be had.
    """
    if not reject_below:
        return None
    calibration = classifier.calibration
    if UNKNOWN in classifier.class_names:
        raise ValueError(f"reject_below: there is a class called {UNKNOWN}, which a rejected answer would be taken for")
    if reject_below == "auto":
        if not 0 <= max_error < 1:
            raise ValueError(f"max_error={max_error}: give a number from 0 to below 1")
        if not classifier.can_reject:
            why = "raw is set" if classifier.raw else "only the best one of a finished run is"
            raise ValueError(f"reject_below=auto needs a calibrated checkpoint, and {why}; or give a number, 0 to 1")
        rejection = calibration.choose_rejection(max_error)
    else:
        try:
            least = float(reject_below)
        except ValueError:
            least = -1.0
        if not 0 <= least <= 1:
            raise ValueError(f"reject_below={reject_below!r}: give auto, or a number from 0 to 1")
        rejection = Rejection(least, calibration.farthest if classifier.can_reject else float("inf"))
    told = f"rejected below {min(rejection.least_probability, 1):.1%}"
    if not classifier.can_reject:
        needed = "leave raw off" if classifier.raw else "that takes a calibrated checkpoint"
        told += f"; nothing is known of distances and of what this costs: {needed}"
    else:
        told += f", or farther than {rejection.farthest:.0f}° from all classes: {rejection.format_cost(calibration)}"
        told += "; with --tta probabilities are lower, so that fewer are accepted" if tta else ""
    print(told, file=sys.stderr)
    return rejection


def choose_format(
    classifier: Model, json_lines: bool, csv_lines: bool, top_k: int, single: bool
) -> Callable[[Answer], str]:
    """How answers are printed: in a terminal as bars for one image and as a table that fits its width for many."""
    if json_lines:
        return to_json
    if csv_lines:
        return lambda answer: to_csv(answer, top_k)
    if not sys.stdout.isatty():
        return to_line
    width = shutil.get_terminal_size().columns
    if single:
        return lambda answer: to_bars(answer, width)
    longest = max(display_width(printable(name)) for name in (*classifier.class_names, UNKNOWN))
    return lambda answer: to_row(answer, width, min(longest, width // 3))


def expand(paths: Iterable[str]) -> Iterator[str]:
    """Files as they are, the images in folders and below, and what globs match, sorted; for "-" those that the
    standard input names.

    The built-in digits are passed over in a folder that has other images. A path that is none of these, and a folder
    without images, come out as they are: reading them gives the error.
    """
    for path in paths:
        if path == "-":
            yield from expand(line for line in read_lines() if line != "-")
            continue
        matches = [path] if os.path.exists(path) else sorted(glob.glob(path, recursive=True)) or [path]
        walked: tuple[str, ...] = ()  # "**" matches a folder and what is in it
        for match in matches:
            if match.startswith(walked):
                continue
            if os.path.isdir(match):
                walked += (os.path.join(match, ""),)
                found = find_images(match, skipped := Counter())
                for reason, count in skipped.items():
                    print(f"passed over in {match}: {count} {reason}", file=sys.stderr)
                yield from [path for path in found if not is_demo(path)] or found or [match]
            else:
                yield match


def read_lines() -> Iterator[str]:
    """The lines of the standard input that aren't empty; bytes that are no UTF-8 as file names have them, on Windows
    in the code page of its console."""
    for line in sys.stdin.buffer:
        if name := line.rstrip(b"\r\n").removeprefix(codecs.BOM_UTF8):  # PowerShell writes one
            try:
                yield os.fsdecode(name)
            except UnicodeDecodeError:  # there is this on Windows only, and so is the codec
                yield name.decode("oem", "replace")


def ask_for_paths() -> Iterator[str]:
    """Paths typed in, until the input ends or a line is empty; quotes around one are taken off."""
    while True:
        print("image (empty line to leave): ", end="", file=sys.stderr, flush=True)
        path = sys.stdin.readline().strip()
        if not path:
            return
        yield path[1:-1] if path[0] == path[-1] and path[0] in "'\"" and len(path) > 2 else path


def keep(classifier: Model, answer: Prediction, folder: Path, explained: bool) -> None:
    """Save an image with its label, and with maps of what the network looked at if it is to be explained."""
    image = open_image(answer.path, classifier.preprocessing.max_pixels, classifier.preprocessing.allow_truncated)
    maps = {}
    if explained:
        from utils.inference.explain import explain_one  # slow to import

        likeliest = classifier.class_names.index(answer.classes[0][0])
        maps = explain_one(classifier, classifier.load(answer.path), likeliest, MIN_SIDE)
    save_labelled(image, answer, folder, maps)


def summarise(counts: Counter[str]) -> str:
    """How many images got which label."""
    failed = counts[""]
    labels = ", ".join(f"{count} as {shorten(printable(name), 40)}" for name, count in counts.most_common(9) if name)
    more = len(counts) > 9
    told = f"{sum(counts.values())} images: {labels}{', ...' if more else ''}"
    return told + (f"; {failed} without an answer" if failed else "")


if __name__ == "__main__":
    sys.exit(cli.run(main))
