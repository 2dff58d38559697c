"""Classify images: `python predict.py PATH ...`, see `--help`."""

from __future__ import annotations

import utils.system.startup  # noqa: F401, before torch

# isort: split

import glob
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated

import tyro
from tqdm import tqdm

from nets.weights.digest import digest_file
from nets.weights.pretrained import BUNDLED_WEIGHTS
from utils.config.other_names import suggest_name
from utils.config.train_config import Device
from utils.inference.classifier import WEIGHTS_SUFFIX, load_classifier
from utils.inference.image_paths import ask_for_paths, drop_copies, expand
from utils.inference.onnx_classifier import ONNX_SUFFIX, is_onnx, open_onnx
from utils.inference.output_formats import csv_header, to_bars, to_csv, to_json, to_line, to_row
from utils.inference.prediction import Failure, Prediction
from utils.inference.prediction_parts import PredictionParts, precision_of
from utils.inference.prediction_sets import images_needed, keep_set, set_threshold
from utils.inference.predictor import BATCH, Predictor, stream_dealt
from utils.inference.rejection import UNKNOWN, Rejection
from utils.inference.save_predictions import choose_copies, copy_result
from utils.runs.checkpoint import find_checkpoint
from utils.runs.folder import CONFIG_FILE, is_run
from utils.system import cli
from utils.system.files import make_writable, remove_abandoned, write_whole
from utils.system.part import Part
from utils.system.runtime import runtime
from utils.system.text import count_of, display_width, printable, shorten

MODEL_SUFFIXES = (ONNX_SUFFIX, WEIGHTS_SUFFIX, ".pth", ".pt", ".pt2")
EXPLAINED = "explained"
"""The folder for `--explain` without `--save`."""
SUGGESTED = "suggested"
"""The folder for `--suggest-labels` without `--out`."""


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
    coverage: float | None = None,
    suggest_labels: int | None = None,
    tta: bool = False,
    raw: bool = False,
    out: str = "",
    part: str = "",
    merge: bool = False,
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
        coverage: print, instead of top_k classes, as many as contain the true one with this probability, such as 0.9,
            by the validation images.
        suggest_labels: instead of predictions, write which images to label next, so many, to suggestions.csv and
            suggestions.html in the folder out, by default "suggested"; sort_into gets copies of these.
        tta: average the logits over test-time augmentation views: five to ten times as slow, often more accurate. The
            probabilities have a temperature of their own.
        raw: ignore the temperature that was fitted after training.
        out: file for the results instead of the standard output; it appears when all are there.
        part: only classify one part of the images, such as 3/16, and write the results to a file beside out; then the
            same command with merge, on one machine, writes out.
        merge: read the results that all parts have written.
        device: auto, cuda, cpu or mps.

    Returns:
        The exit status: 1 if there is an image without a prediction, or that couldn't be written. It is 0 for a part.
    """
    if suggest_labels is not None:
        others = {"json": json_lines, "csv": csv_lines, "save": save, "explain": explain, "reject_below": reject_below}
        others |= {"coverage": coverage is not None, "tta": tta, "part": part, "merge": merge}
        runtime.first(lambda: check_suggestion(suggest_labels, [flag for flag, given in others.items() if given]))
        return suggest_images(model_path, paths, suggest_labels, Path(out or SUGGESTED), sort_into, device, raw)
    chosen = runtime.first(lambda: check_parts(part, merge, out, bool(save or sort_into or explain)))
    runtime.first(lambda: check_arguments(top_k, json_lines, csv_lines, save, sort_into, out))
    model_path, paths = runtime.first(lambda: choose_model(model_path, paths))
    runtime.first(lambda: check_source(paths, in_parts=bool(part or merge)))
    model_file = runtime.first(lambda: choose_file(model_path, device, raw, tta, explain, reject_below))
    model, sha256 = open_model(model_file, device, raw, with_digest=bool(part or merge))
    if tta:
        runtime.first(lambda: report_tta(model))
    rejection = runtime.first(lambda: choose_rejection(model, reject_below, max_error, tta))
    threshold = runtime.first(lambda: choose_threshold(model, coverage, tta, csv_lines, bool(part or merge)))
    save = save or (EXPLAINED if explain else "")
    top_k = len(model.class_names) if threshold is not None else min(top_k, len(model.class_names))

    if paths and ("-" not in paths or part or merge):
        images = runtime.first(lambda: list(expand(paths)))
    else:
        images = expand(paths or ask_for_paths())
    to_text = choose_format(model, json_lines, csv_lines, top_k, is_single(paths, images), to_file=bool(out))
    header = csv_header(top_k) if csv_lines else ""
    target = Path(out) if out else None
    parts = PredictionParts(Path(out), sha256, model, images, top_k, tta, rejection) if part or merge else None
    if parts and chosen:
        images = [images[i] for i in parts.rows(chosen)]
        to_text, header, target = to_json, parts.header(chosen), chosen.place(parts.path)
    stream = partial(model.stream, top_k=top_k, batch_size=BATCH if paths else 1, tta=tta, rejection=rejection)
    if parts and merge:
        results = parts.read()
    else:
        results = stream_dealt(stream, images, BATCH) if runtime.world_size > 1 else stream(images)
    total = len(images) if isinstance(images, list) else None
    if paths and (total is None or total > BATCH):
        # disable=None shows the bar in terminals only.
        results = tqdm(results, total=total, unit="image", leave=False, disable=None)

    copies = choose_copies(model, save, explain, sort_into)
    runtime.first(lambda: make_folders(save, sort_into, out))
    labels: Counter[str] = Counter()
    written: Counter[str] = Counter()
    num_failures = 0
    with open_results(target) as write:
        if header:
            write(header)
        for result in results:  # on rank 0; on other ranks this takes part in its results
            if threshold is not None and isinstance(result, Prediction):
                result = keep_set(result, threshold)
            write(to_text(result))
            if isinstance(result, Failure):
                num_failures += 1
                continue
            labels[result.label] += 1
            written.update(copy_result(result, copies))
    return runtime.first(lambda: report(labels, num_failures, written, copies, target, chosen))


def check_parts(part: str, merge: bool, out: str, with_copies: bool) -> Part | None:
    """The part that is chosen, if any.

    Raises:
        ValueError: the arguments can't be combined.
    """
    if part and merge:
        raise ValueError("part and merge: choose one of them")
    if (part or merge) and not out:
        raise ValueError("out: part and merge need it; give the file for the results of all parts")
    if part and with_copies:
        raise ValueError("part: can't be combined with save, explain or sort_into; give these with merge")
    if merge and runtime.world_size > 1:
        raise ValueError("merge: reads what is computed, so start it with python, not with torchrun")
    return Part.parse(part) if part else None


def check_suggestion(count: int, others: Sequence[str]) -> None:
    """Raise a ValueError if `suggest_labels` is invalid, or can't be combined with the other flags that are given."""
    if count < 1:
        raise ValueError(f"suggest_labels={count}: give a whole number from 1 up")
    if others:
        raise ValueError(f"suggest_labels: can't be combined with {', '.join(others)}; it writes a table and a page")
    if runtime.world_size > 1:
        raise ValueError("suggest_labels: compares all images, so start it with python, not with torchrun")


def suggest_images(
    model_path: str, paths: tuple[str, ...], count: int, out: Path, sort_into: str, device: Device, raw: bool
) -> int:
    """Write which images to label next, see `utils.inference.suggestions`; return the exit status."""
    from utils.inference.suggestions import labeled_images, suggest  # slow to import
    from utils.inference.suggestions_page import PAGE, TABLE, write_suggestions

    cli.check_folder("out", str(out))
    cli.check_folder("sort_into", sort_into)
    model_path, paths = choose_model(model_path, paths)
    if not paths:
        raise ValueError("paths: suggest_labels needs them; give folders, files, globs, or - for standard input")
    file = choose_file(model_path, device, raw, tta=False, explain=False, reject_below="", suggest=True)
    model = load_classifier(file, device, raw)
    if len(model.class_names) < 2:
        raise ValueError(f"suggest_labels: {file} has a single class, so no prediction is uncertain")
    copies = choose_copies(model, "", False, sort_into)
    make_folders("", sort_into, str(out / TABLE))
    found = list(expand(paths))
    images = drop_copies(found, labeled_images(file, model))
    if len(images) < len(found):
        print(f"skipped: {count_of(len(found) - len(images), 'image')} of the run's lists", file=sys.stderr)

    failures: list[Failure] = []
    suggested = suggest(model, tqdm(images, unit="image", leave=False, disable=None), count, failures.append)
    for failure in failures:
        print_line(to_line(failure))
    commands = next_commands(file)
    write_suggestions(out, suggested, len(images), model.preprocessing, commands)
    written = Counter(folder for image in suggested for folder in copy_result(image, copies))
    failed = f"; {len(failures)} failed" if failures else ""
    print(f"suggested: {len(suggested)} of {count_of(len(images), 'image')}{failed}", file=sys.stderr)
    if len(suggested) < min(count, len(images) - len(failures)):
        print("there are no more: the other uncertain images are near-duplicates of these", file=sys.stderr)
    for folder in copies:
        print(f"written to {Path(folder)}: {count_of(written[folder], 'image')}", file=sys.stderr)
    todo = f"correct the folders in {sort_into}, copy their images" if sort_into else "copy each image"
    print(f"written to {out / TABLE} and {out / PAGE}", file=sys.stderr)
    print(f"next: {todo} to the training folder of its class, then", *commands, sep="\n  ", file=sys.stderr)
    return 1 if failures or any(written[folder] < len(suggested) for folder in copies) else 0


def next_commands(checkpoint: Path) -> list[str]:
    """What to run when the images that were suggested are in the folders of their classes."""
    trained = ["--continue", str(checkpoint.parent)] if is_run(checkpoint.parent) else []
    return [cli.command("python", "txt_annotation.py"), cli.command("python", "train.py", *trained)]


def check_source(paths: tuple[str, ...], in_parts: bool) -> None:
    """Raise a ValueError if the images can't come from standard input, but would."""
    if in_parts and not paths:
        raise ValueError("paths: part and merge need them; give files, folders or globs, or - for standard input")
    if runtime.world_size > 1 and (not paths or "-" in paths):
        raise ValueError("paths: several processes don't read standard input; give files, folders or globs")


def check_arguments(top_k: int, json_lines: bool, csv_lines: bool, save: str, sort_into: str, out: str) -> None:
    """Raise a ValueError for invalid values."""
    if top_k < 1:
        raise ValueError(f"top_k={top_k}: give a whole number from 1 up")
    if json_lines and csv_lines:
        raise ValueError("json and csv: choose one of them")
    cli.check_folder("save", save)
    cli.check_folder("sort_into", sort_into)
    if out and Path(out).is_dir():
        raise ValueError(f"out={out!r}: it is a folder; give a file")


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


def choose_file(
    model_path: str, device: Device, raw: bool, tta: bool, explain: bool, reject_below: str, suggest: bool = False
) -> Path:
    """The checkpoint or exported file at `model_path`, which is printed.

    Raises:
        FileNotFoundError: there is no checkpoint.
        ValueError: the file doesn't support an argument.
    """
    if model_path.lower().endswith(".pt2"):
        raise ValueError(f"{model_path}: predict.py doesn't read .pt2; give the checkpoint, or export it to ONNX")
    if not is_onnx(model_path):
        checkpoint = find_model(model_path)
        print(f"checkpoint {checkpoint}", file=sys.stderr)
        return checkpoint
    needs_checkpoint = {
        "explain": explain,
        "suggest_labels": suggest,
        "raw": raw,
        "tta": tta,
        "reject_below=auto": reject_below == "auto",
        f"device={device}": device not in ("auto", "cpu"),
    }
    if options := [name for name, is_set in needs_checkpoint.items() if is_set]:
        raise ValueError(f"{', '.join(options)}: not available for the ONNX file {model_path}; use its checkpoint")
    print(f"exported file {model_path}", file=sys.stderr)
    return Path(model_path)


def open_model(file: Path, device: Device, raw: bool, with_digest: bool) -> tuple[Predictor, str]:
    """The model in a file, the same on all ranks; and the SHA-256 of the file, "" if that isn't needed."""
    needed = file.is_file() and (with_digest or runtime.world_size > 1)
    sha256 = digest_file(file) if needed else ""
    model = open_onnx(file) if is_onnx(str(file)) else load_classifier(file, device, raw)
    runtime.check_same({"model": sha256, "precision": precision_of(model)})
    return model, sha256


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


def report_tta(model: Predictor) -> None:
    """Print a note if the probabilities with TTA aren't calibrated, although they could be."""
    if not model.raw and (model.calibration is None or model.calibration.tta_temperature is None):
        print(
            "note: the probabilities with --tta are not calibrated: only the best checkpoint of a run finished by this "
            "version is",
            file=sys.stderr,
        )


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
        message += "; the threshold and these figures are without --tta" if tta else ""
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


def choose_threshold(
    model: Predictor, coverage: float | None, tta: bool, csv_lines: bool, in_parts: bool
) -> float | None:
    """The probability from which on a class is printed; None: the top_k classes are.

    Raises:
        ValueError: coverage isn't a probability, can't be had from this model, or can't be combined.
    """
    if coverage is None:
        return None
    if not 0 < coverage < 1:
        raise ValueError(f"coverage={coverage}: give a number between 0 and 1, such as 0.9")
    if flags := [flag for flag, given in {"tta": tta, "csv": csv_lines, "part, merge": in_parts}.items() if given]:
        reason = "the validation images had no views" if tta else "the number of classes differs; use json in one run"
        raise ValueError(f"coverage: can't be combined with {', '.join(flags)}: {reason}")
    calibration = model.calibration if model.can_reject else None
    if calibration is None or calibration.true_probability is None:
        reason = "raw is set" if model.raw else "only the best one of a run finished by this version is"
        raise ValueError(f"coverage: needs a calibrated checkpoint, and {reason}")
    threshold, count = set_threshold(calibration.true_probability, coverage), len(calibration.true_probability)
    message = f"classes from {threshold:.2%} on are printed, for a coverage of {coverage:.0%} by {count} images"
    if count < (needed := images_needed(coverage)):
        message = f"warning: all classes are printed: {coverage:.0%} need {needed} validation images, there are {count}"
    print(message, file=sys.stderr)
    return threshold


def is_single(paths: tuple[str, ...], images: Iterable[str]) -> bool:
    """Whether images are shown one by one: a single one, or those that are typed."""
    return not paths or (isinstance(images, list) and len(images) == 1)


def choose_format(
    model: Predictor, json_lines: bool, csv_lines: bool, top_k: int, single: bool, to_file: bool
) -> Callable[[Prediction | Failure], str]:
    """The function that formats results; in a terminal, bars for a single image and table rows for several."""
    if json_lines:
        return to_json
    if csv_lines:
        return lambda result: to_csv(result, top_k)
    if to_file or not sys.stdout.isatty():
        return to_line
    width = shutil.get_terminal_size().columns
    if single:
        return lambda result: to_bars(result, width)
    longest = max(display_width(printable(name)) for name in (*model.class_names, UNKNOWN))
    return lambda result: to_row(result, width, min(longest, width // 3))


@contextmanager
def open_results(path: Path | None) -> Iterator[Callable[[str], None]]:
    """A function that writes a line of results: to a file, which is there at the end, or else to standard output."""
    if path is None or not runtime.is_main:
        yield print_line
        return
    remove_abandoned(path.parent, glob.escape(path.name))
    with write_whole(path) as file:
        yield lambda line: file.write(printable(line, keep="\n\r\t").encode() + b"\n")


def print_line(line: str) -> None:
    """Print a line at once, above a progress bar."""
    tqdm.write(line, file=sys.stdout)
    sys.stdout.flush()


def make_folders(save: str, sort_into: str, out: str) -> None:
    """Create the folders that are written to, see `make_writable`."""
    for folder, flag in ((save, "--save"), (sort_into, "--sort-into"), (out and Path(out).parent, "--out")):
        if folder:
            make_writable(Path(folder), flag)


def report(
    labels: Counter[str],
    num_failures: int,
    written: Counter[str],
    folders: Iterable[str],
    target: Path | None,
    part: Part | None,
) -> int:
    """Print what was predicted and written, and return the exit status."""
    if labels.total() + num_failures > 1:
        print(summarize(labels, num_failures), file=sys.stderr)
    for folder in folders:
        print(f"written to {Path(folder)}: {count_of(written[folder], 'image')}", file=sys.stderr)
    if part:
        done = f"part {part} is written to {target}; when all are: the same command with --merge in place of --part"
        print(done, file=sys.stderr)
        return 0
    if target:
        print(f"written to {target}", file=sys.stderr)
    return 1 if num_failures or any(written[folder] < labels.total() for folder in folders) else 0


def summarize(labels: Counter[str], num_failures: int) -> str:
    """A line with the number of images per label."""
    counts = ", ".join(f"{count} as {shorten(printable(name), 40)}" for name, count in labels.most_common(9))
    more = ", ..." if len(labels) > 9 else ""
    failures = f"; {num_failures} failed" if num_failures else ""
    return f"{count_of(labels.total() + num_failures, 'image')}: {counts}{more}{failures}"


if __name__ == "__main__":
    sys.exit(cli.run(main, suggest=suggest_name))
