"""Classify images: `python predict.py PATH ...`, see `--help`."""

from __future__ import annotations

import utils.system.startup  # noqa: F401, before torch

# isort: split

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
from utils.annotation.folder_scan import find_images
from utils.config.other_names import suggest_name
from utils.config.train_config import Device
from utils.data.image_io import ImageError, open_image
from utils.inference.classifier import WEIGHTS_SUFFIX, Classifier, load_classifier
from utils.inference.onnx_classifier import ONNX_SUFFIX, is_onnx, open_onnx
from utils.inference.output_formats import csv_header, to_bars, to_csv, to_json, to_line, to_row
from utils.inference.prediction import Failure, Prediction
from utils.inference.predictor import BATCH, Predictor
from utils.inference.rejection import UNKNOWN, Rejection
from utils.inference.save_predictions import MIN_SIDE, copy_into, folder_names, save_labeled
from utils.runs.checkpoint import find_checkpoint
from utils.runs.folder import CONFIG_FILE, in_run, is_run
from utils.system import cli
from utils.system.files import make_writable
from utils.system.text import count_of, display_width, printable, shorten

MODEL_SUFFIXES = (ONNX_SUFFIX, WEIGHTS_SUFFIX, ".pth", ".pt", ".pt2")
EXPLAINED = "explained"
"""The folder for `--explain` without `--save`."""


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
    """Classify images.

    Args:
        paths: files, folders (searched recursively) and globs. "-": read paths from standard input, one per line, and
            classify in batches. Without paths: ask for them one by one. If the first is a checkpoint, a run folder
            or an exported file, it is the model.
        model_path: a checkpoint, a run folder, a folder of runs (the newest is used), or an .onnx or .safetensors file
            of export.py. Default: logs/, or the bundled weights (ten classes) if there is no run yet.
        top_k: number of classes to print.
        json_lines: print one JSON object per line, with path, label and predictions, or error.
        csv_lines: print comma-separated values.
        save: folder for copies of the images with their labels below.
        explain: save the images (in "explained" without save) with Grad-CAM and attention maps beside them.
        sort_into: folder for copies of the images, in one folder per class; nothing is overwritten.
        reject_below: print "unknown" if the probability is below this number, 0 to 1, or the image is unlike all
            classes. "auto": choose the number on the validation images, see max_error.
        max_error: with reject_below=auto, the error rate allowed among the accepted predictions.
        tta: average over test-time augmentation views: five to ten times as slow, sometimes slightly more accurate.
        raw: ignore the temperature that was fitted after training.
        device: auto, cuda, cpu or mps.

    Returns:
        The exit status: 1 if there is an image without a prediction, or that couldn't be written.
    """
    check_arguments(top_k, json_lines, csv_lines, save, sort_into)
    model_path, paths = choose_model(model_path, paths)
    model = open_model(model_path, device, raw, tta, explain, reject_below)
    rejection = choose_rejection(model, reject_below, max_error, tta)
    save = save or (EXPLAINED if explain else "")
    top_k = min(top_k, len(model.class_names))

    images = list(expand(paths)) if paths and "-" not in paths else expand(paths or ask_for_paths())
    total = len(images) if isinstance(images, list) else None
    show_bar = bool(paths) and (total is None or total > BATCH)
    to_text = choose_format(model, json_lines, csv_lines, top_k, single=not paths or total == 1)
    if csv_lines:
        print(csv_header(top_k))

    folders = folder_names([*model.class_names, UNKNOWN])
    outputs: dict[str, Callable[[Prediction], object]] = {}  # by folder
    if save:
        outputs[save] = lambda result: save_image(model, result, Path(save), explain)
    if sort_into:
        outputs[sort_into] = lambda result: copy_into(result.path, Path(sort_into, folders[result.label]))
    for folder, flag in ((save, "--save"), (sort_into, "--sort-into")):
        if folder:
            make_writable(Path(folder), flag)
    labels: Counter[str] = Counter()
    written: Counter[str] = Counter()
    num_failures = 0
    results = model.stream(images, top_k, BATCH if paths else 1, tta, rejection)
    # disable=None shows the bar in terminals only.
    for result in tqdm(results, total=total, unit="image", leave=False, disable=None if show_bar else True):
        tqdm.write(to_text(result), file=sys.stdout)
        sys.stdout.flush()
        if isinstance(result, Failure):
            num_failures += 1
            continue
        labels[result.label] += 1
        for folder, write in outputs.items():
            try:
                write(result)
                written[folder] += 1
            except (ImageError, OSError) as error:
                tqdm.write(f"error: {result.path} isn't written to {folder}/: {error}", file=sys.stderr)
    if labels.total() + num_failures > 1:
        print(summarize(labels, num_failures), file=sys.stderr)
    for folder in outputs:
        print(f"written to {Path(folder)}: {count_of(written[folder], 'image')}", file=sys.stderr)
    return 1 if num_failures or written.total() < labels.total() * len(outputs) else 0


def check_arguments(top_k: int, json_lines: bool, csv_lines: bool, save: str, sort_into: str) -> None:
    """Raise a ValueError for invalid values."""
    if top_k < 1:
        raise ValueError(f"top_k={top_k}: give a whole number from 1 up")
    if json_lines and csv_lines:
        raise ValueError("json and csv: choose one of them")
    cli.check_folder("save", save)
    cli.check_folder("sort_into", sort_into)


def choose_model(model_path: str, paths: tuple[str, ...]) -> tuple[str, tuple[str, ...]]:
    """The path of the model and those of the images: a checkpoint, exported file or run that comes first in `paths` is
    the model.

    Raises:
        ValueError: there are two models, or one is among the images.
    """
    if paths and is_model(paths[0]):
        if model_path:
            raise ValueError(f"there are two models, {model_path} and {paths[0]}: remove model_path or the first path")
        model_path, *paths = paths
    for path in paths:
        if is_model(path):
            raise ValueError(f"{path}: a model among the images; give the model first, and only one")
    return model_path, tuple(paths)


def is_model(path: str) -> bool:
    """Whether a path is a checkpoint, an exported file, a run folder or a folder of runs."""
    folder = Path(path)
    return path.lower().endswith(MODEL_SUFFIXES) or (
        folder.is_dir() and (is_run(folder) or any(map(is_run, folder.iterdir())))
    )


def open_model(model_path: str, device: Device, raw: bool, tta: bool, explain: bool, reject_below: str) -> Predictor:
    """Open a checkpoint or an exported file, and print its path."""
    if model_path.lower().endswith(".pt2"):
        raise ValueError(f"{model_path}: predict.py doesn't read .pt2; give the checkpoint, or export it to ONNX")
    if not is_onnx(model_path):
        checkpoint = find_model(model_path)
        print(f"checkpoint {checkpoint}", file=sys.stderr)
        return load_classifier(checkpoint, device, raw)
    needs_checkpoint = {
        "explain": explain,
        "raw": raw,
        "tta": tta,
        "reject_below=auto": reject_below == "auto",
        f"device={device}": device not in ("auto", "cpu"),
    }
    if options := [name for name, is_set in needs_checkpoint.items() if is_set]:
        raise ValueError(f"{', '.join(options)}: not available for the ONNX file {model_path}; use its checkpoint")
    print(f"exported file {model_path}", file=sys.stderr)
    return open_onnx(model_path)


def find_model(model_path: str) -> Path:
    """The checkpoint at `model_path`; the bundled weights if it is empty and there is no run in logs/.

    Raises:
        FileNotFoundError: there is no checkpoint.
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
        print("there is no run in logs/ yet; using the bundled weights", file=sys.stderr)
        return BUNDLED_WEIGHTS


def choose_rejection(model: Predictor, reject_below: str, max_error: float, tta: bool) -> Rejection | None:
    """Choose which predictions to reject, and print the effect on the validation images; None: reject none."""
    if not reject_below:
        return None
    if UNKNOWN in model.class_names:
        raise ValueError(f"reject_below: a class is named {UNKNOWN}, which is the label of rejected predictions")
    if reject_below == "auto":
        rejection = choose_automatically(model, max_error)
    else:
        try:
            least = float(reject_below)
        except ValueError:
            least = -1.0
        if not 0 <= least <= 1:
            raise ValueError(f"reject_below={reject_below!r}: give auto, or a number from 0 to 1")
        rejection = Rejection(least, model.calibration.max_distance) if model.can_reject else Rejection(least)
    message = f"rejected below {min(rejection.min_probability, 1):.1%}"
    if model.can_reject:
        cost = rejection.format_cost(model.calibration)
        message += f", or farther than {rejection.max_distance:.0f}° from all classes: {cost}"
        message += "; with --tta probabilities are lower, so fewer are accepted" if tta else ""
    else:
        needed = "remove --raw" if model.raw else "this needs a calibrated checkpoint"
        message += f"; images unlike all classes are not detected: {needed}"
    print(message, file=sys.stderr)
    return rejection


def choose_automatically(model: Predictor, max_error: float) -> Rejection:
    """The rejection that allows `max_error` on the validation images."""
    if not 0 <= max_error < 1:
        raise ValueError(f"max_error={max_error}: give a number from 0 to below 1")
    if not model.can_reject:
        reason = "raw is set" if model.raw else "only the best one of a finished run is"
        raise ValueError(f"reject_below=auto needs a calibrated checkpoint, and {reason}; or give a number, 0 to 1")
    return model.calibration.choose_rejection(max_error)


def choose_format(
    model: Predictor, json_lines: bool, csv_lines: bool, top_k: int, single: bool
) -> Callable[[Prediction | Failure], str]:
    """The function that formats results; in a terminal, bars for a single image and table rows for several."""
    if json_lines:
        return to_json
    if csv_lines:
        return lambda result: to_csv(result, top_k)
    if not sys.stdout.isatty():
        return to_line
    width = shutil.get_terminal_size().columns
    if single:
        return lambda result: to_bars(result, width)
    longest = max(display_width(printable(name)) for name in (*model.class_names, UNKNOWN))
    return lambda result: to_row(result, width, min(longest, width // 3))


def expand(paths: Iterable[str]) -> Iterator[str]:
    """Yield files, the images below folders, and the matches of globs, sorted; for "-", those of standard input.

    A path that doesn't exist and a folder without
    images are yielded as they are, so that reading them fails with a message.
    """
    for path in paths:
        if path == "-":
            yield from expand(line for line in read_lines() if line != "-")
            continue
        matches = [path] if os.path.exists(path) else find_matches(path) or [path]
        searched: tuple[str, ...] = ()  # "**" matches a folder and also what is in it
        for match in matches:
            if match.startswith(searched):
                continue
            if os.path.isdir(match):
                searched += (os.path.join(match, ""),)
                found = find_images(match, skipped := Counter())
                of_runs = set(filter(in_run, set(map(os.path.dirname, found))))
                images = [path for path in found if os.path.dirname(path) not in of_runs]
                skipped["plots of runs"] += len(found) - len(images)
                for reason, count in (+skipped).items():
                    print(f"skipped in {match}: {count} {reason}", file=sys.stderr)
                yield from images or [match]
            else:
                yield match


def find_matches(pattern: str) -> list[str]:
    """Return the sorted matches of a glob. Brackets in the leading part that exists are part of its name, and so are
    others if nothing matches them."""
    folder, rest = pattern, ""
    while folder and not os.path.exists(folder):
        folder, name = os.path.split(folder)
        rest = os.path.join(name, rest) if rest else name
    folder = glob.escape(folder)
    matches = glob.glob(os.path.join(folder, rest), recursive=True)
    return sorted(matches or glob.glob(os.path.join(folder, rest.replace("[", "[[]")), recursive=True))


def read_lines() -> Iterator[str]:
    """Yield the non-empty lines of standard input, decoded as file names.

    Raises:
        ValueError: on Windows, a line isn't UTF-8.
    """
    for line in sys.stdin.buffer:
        if name := line.rstrip(b"\r\n").removeprefix(codecs.BOM_UTF8):  # PowerShell writes a BOM
            try:
                yield os.fsdecode(name)
            except UnicodeDecodeError as error:
                raise ValueError(f"standard input: {name!r} isn't UTF-8; run chcp 65001 first") from error


def ask_for_paths() -> Iterator[str]:
    """Yield typed paths, without quotes around them, until an empty line or the end of the input."""
    while True:
        print("image (empty line to quit): ", end="", file=sys.stderr, flush=True)
        path = sys.stdin.readline().strip()
        if not path:
            return
        yield path[1:-1] if path[0] == path[-1] and path[0] in "'\"" and len(path) > 2 else path


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


def summarize(labels: Counter[str], num_failures: int) -> str:
    """A line with the number of images per label."""
    counts = ", ".join(f"{count} as {shorten(printable(name), 40)}" for name, count in labels.most_common(9))
    more = ", ..." if len(labels) > 9 else ""
    failures = f"; {num_failures} failed" if num_failures else ""
    return f"{count_of(labels.total() + num_failures, 'image')}: {counts}{more}{failures}"


if __name__ == "__main__":
    sys.exit(cli.run(main, suggest=suggest_name))
