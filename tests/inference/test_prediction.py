"""predict.py's inputs and outputs, `Classifier.predict` and `stream`, and the output formats."""

import csv
import io
import json
import os
import pty
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import predict
from tests.conftest import write_image
from utils.data.image_io import ImageError, open_image
from utils.inference.classifier import Classifier, load_classifier
from utils.inference.output_formats import to_bars, to_csv, to_json, to_line, to_row
from utils.inference.prediction import Failure, Prediction
from utils.inference.predictor import read_region
from utils.inference.rejection import UNKNOWN, Calibration, Rejection
from utils.inference.save_predictions import copy_into, folder_names
from utils.inference.tta_views import TTAViews
from utils.runs.checkpoint import find_checkpoint, load_checkpoint, save_checkpoint
from utils.system.text import display_width, shorten

ROOT = Path(__file__).resolve().parents[2]
DARK, LIGHT = "datasets/test/dark/00.png", "datasets/test/light/00.png"


@pytest.fixture
def classifier(trained):
    return load_classifier(find_checkpoint(""), "cpu")


def test_paths_images_and_arrays_give_the_same_prediction(classifier):
    image = open_image(DARK)
    inputs = [DARK, Path(DARK), image, np.asarray(image), np.asarray(image)[..., 0]]
    predictions = classifier.predict(inputs)
    assert [prediction.label for prediction in predictions] == ["dark"] * 5
    assert [prediction.path for prediction in predictions] == [DARK, DARK, "", "", ""]
    assert [prediction.probability for prediction in predictions[:4]] == pytest.approx(
        [predictions[0].probability] * 4, abs=1e-6
    )
    (alone,) = classifier.predict(DARK)
    assert dict(alone.classes) == pytest.approx(dict(predictions[0].classes), abs=1e-6)
    assert sum(p for _, p in predictions[0].classes) == pytest.approx(1)
    assert len(classifier.predict(DARK, top_k=1)[0].classes) == 1
    assert classifier.predict([]) == []


def test_exif_orientation_is_applied_without_changing_the_image(classifier, tmp_path):
    image = open_image(DARK)
    exif = Image.Exif()
    exif[274] = 6
    image.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "rotated.png", exif=exif)
    with Image.open(tmp_path / "rotated.png") as rotated:
        size = rotated.size
        (prediction,) = classifier.predict(rotated)
        assert rotated.size == size
    assert prediction.probability == pytest.approx(classifier.predict(image)[0].probability, abs=1e-6)


@pytest.mark.parametrize(
    "array",
    [np.zeros((4, 4, 3)), np.zeros((4, 4, 4), np.uint8), np.zeros((2, 4, 4, 3), np.uint8), np.zeros((0, 4), np.uint8)],
)
def test_arrays_of_another_dtype_or_shape_are_refused(classifier, array):
    with pytest.raises(ValueError, match=r"give uint8 from 0 to 255, \(height, width, 3\) in RGB or \(height, width\)"):
        classifier.predict(array)


def test_invalid_inputs_and_arguments(classifier, tmp_path):
    for wrong in ([5], [None], [torch.zeros(3, 4, 4)]):
        with pytest.raises(ValueError, match=r"give a path, an? Pillow image, or a numpy array"):
            classifier.predict(wrong)
    for wrong in ({"batch_size": 0}, {"top_k": 0}):
        with pytest.raises(ValueError, match="whole numbers from 1 up"):
            classifier.predict(DARK, **wrong)
    (tmp_path / "half.png").write_bytes(Path(DARK).read_bytes()[:400])
    with Image.open(tmp_path / "half.png") as half:
        first, second = classifier.stream([half, LIGHT])
    assert isinstance(first, Failure) and "half.png" in first.error
    assert second.label == "light"


def test_rejection_of_tta_views_uses_the_distance_of_the_first_view(classifier, monkeypatch):
    """Brightness takes the place of embedding and distance."""
    distances = []

    class RecordingRejection:
        def reason(self, probability, distance):
            distances.append(distance)
            return ""

    def brightness(_, pixels):
        return pixels.float().mean(dim=(1, 2, 3))[:, None], torch.zeros(len(pixels), 2)

    monkeypatch.setattr(Classifier, "forward", brightness)
    monkeypatch.setattr(Calibration, "distances", lambda _, embeddings: embeddings[:, 0])
    classifier.predict([DARK, LIGHT, DARK], tta=True, rejection=RecordingRejection())
    assert distances == pytest.approx([60, 190, 60], abs=10)


def test_predict_raises_and_stream_yields_a_failure_for_an_unreadable_file(classifier, tmp_path):
    (tmp_path / "broken.jpg").write_text("no image")
    with pytest.raises(ImageError, match=r"broken\.jpg can't be read"):
        classifier.predict([DARK, tmp_path / "broken.jpg"])
    first, second, third = classifier.stream([DARK, tmp_path / "broken.jpg", LIGHT])
    assert (first.label, third.label) == ("dark", "light")
    assert isinstance(second, Failure) and second.path.endswith("broken.jpg")


@pytest.mark.parametrize("raw", [False, True])
def test_tta_averages_logits_at_a_temperature_of_its_own(trained, raw):
    classifier = load_classifier("", "cpu", raw)
    classifier = replace(classifier, calibration=replace(classifier.calibration, tta_temperature=3.0))
    (prediction,) = classifier.predict(LIGHT, tta=True)
    views = TTAViews(classifier.preprocessing, mirror=True)
    pixels = views.resize(read_region(LIGHT, classifier.preprocessing, views))
    logits = torch.stack([classifier.forward(view[None])[1][0] for view in pixels])
    expected = (logits.mean(dim=0) / (1 if raw else 3)).softmax(dim=0)
    assert dict(prediction.classes) == pytest.approx(
        dict(zip(["dark", "light"], expected.tolist(), strict=True)), abs=1e-6
    )


def test_a_checkpoint_without_a_temperature_for_tta_opens_with_a_note(trained, tmp_path, capsys):
    note = "note: the probabilities with --tta are not calibrated"
    predict.main((DARK,), tta=True)
    assert note not in capsys.readouterr().err
    content = load_checkpoint(find_checkpoint(""))
    del content["calibration"]["tta_temperature"]
    save_checkpoint(tmp_path / "earlier.safetensors", content)
    predict.main((str(tmp_path / "earlier.safetensors"), DARK), tta=True)
    assert note in capsys.readouterr().err
    for flags in ({"tta": True, "raw": True}, {}):
        predict.main((str(tmp_path / "earlier.safetensors"), DARK), **flags)
        assert note not in capsys.readouterr().err
    earlier = load_classifier(tmp_path / "earlier.safetensors", "cpu")
    assert earlier.tta_temperature == earlier.temperature == load_classifier("", "cpu").temperature


def test_rejected_predictions_have_a_reason(classifier):
    (prediction,) = classifier.predict(DARK, rejection=Rejection(1.0))
    assert prediction.label == UNKNOWN and prediction.rejected
    assert prediction.reason.startswith("low probability: ")
    assert prediction.classes[0][0] == "dark"
    (prediction,) = classifier.predict(DARK, rejection=Rejection(0.0, max_distance=-1.0))
    assert prediction.reason.startswith("unlike all classes: ")
    (prediction,) = classifier.predict(DARK, rejection=Rejection(0.0))
    assert prediction.label == "dark" and not prediction.rejected


def test_control_characters_are_escaped():
    prediction = Prediction("a\x1b]0;x\x07.jpg", "\x1b[31mbee", 0.9, (("\x1b[31mbee", 0.9), ("ant", 0.1)))
    lines = [
        to_line(prediction),
        to_line(Failure(prediction.path, "\x07")),
        to_bars(prediction, 60),
        to_row(prediction, 60, 20),
    ]
    lines.append(predict.summarize(Counter([prediction.label, "ant"]), 0))
    assert not any(character in line for line in lines for character in "\x1b\x07")


def test_lines_json_and_csv():
    prediction = Prediction("a b.png", "cat", 0.9, (("cat", 0.9), ("dog, big", 0.1)))
    assert to_line(prediction) == "a b.png: cat 90.0%  (dog, big 10.0%)"
    assert json.loads(to_json(prediction)) == {
        "path": "a b.png",
        "label": "cat",
        "predictions": [{"class": "cat", "probability": 0.9}, {"class": "dog, big", "probability": 0.1}],
    }
    rejected = Prediction("x.png", UNKNOWN, 0.6, (("cat", 0.6),), "low probability")
    assert to_line(rejected) == "x.png: unknown, low probability  (most likely: cat 60.0%)"
    assert json.loads(to_json(rejected))["reason"] == "low probability"
    assert to_line(Failure("x", "x is broken")) == "x: error: x is broken"
    row = next(csv.reader(io.StringIO(to_csv(prediction, 3))))
    assert row == ["a b.png", "cat", "cat", "0.900000", "dog, big", "0.100000", "", "", ""]
    assert next(csv.reader(io.StringIO(to_csv(Failure("x", "no, it is broken"), 1)))) == [
        "x",
        "",
        "",
        "",
        "no, it is broken",
    ]


@pytest.mark.parametrize("width", [40, 80, 200])
@pytest.mark.parametrize("name", ["cat", "a class with a name that is far too long for any table", "猫" * 30, "é"])
def test_tables_and_bars_fit_the_terminal(width, name):
    prediction = Prediction("a/very/long/path/" * 6 + "end.png", name, 0.87, ((name, 0.87), ("other", 0.13)))
    lines = [*to_bars(prediction, width).splitlines(), to_row(prediction, width, min(24, width // 3))]
    assert max(map(display_width, lines)) <= width
    assert lines[-1].endswith("end.png")
    likely, unlikely = (line.count("█") for line in lines[1:3])
    assert likely > 4 * unlikely
    rejected = Prediction("p.png", UNKNOWN, 0.6, ((name, 0.6),), "low probability")
    assert "unknown?" in to_row(rejected, width, 10) and display_width(to_row(rejected, width, 10)) <= width
    failure = Failure("x.png", "x.png can't be read as an image " * 5)
    assert display_width(to_row(failure, width, 10)) <= width


def test_shorten_counts_terminal_columns():
    assert shorten("abcdef", 4) == "abc…"
    assert shorten("abcdef", 4, keep_end=True) == "…def"
    assert shorten("猫犬鳥", 4) == "猫…"
    assert shorten("abc", 3) == "abc"


def test_csv_of_paths_from_standard_input(trained, command):
    result = command("predict.py", "--csv", "-", input=f"{DARK}\ndatasets/test/light\n\nnone.png\n")
    assert result.returncode == 1
    rows = list(csv.DictReader(io.StringIO(result.stdout)))
    assert [row["path"] for row in rows] == [DARK, *(f"datasets/test/light/{i:02d}.png" for i in range(5)), "none.png"]
    assert [row["label"] for row in rows] == ["dark"] + ["light"] * 5 + [""]
    assert rows[0]["class_1"] == "dark" and rows[0]["class_2"] == "light"
    assert "no such file" in rows[-1]["note"]
    assert "7 images: 5 as light, 1 as dark; 1 failed" in result.stderr


def test_standard_input_between_other_paths(trained, command):
    result = command("predict.py", "--json", LIGHT, "-", DARK, input="datasets/test/dark/01.png\n-\n")
    labels = [(json.loads(line)["path"], json.loads(line)["label"]) for line in result.stdout.splitlines()]
    assert labels == [(LIGHT, "light"), ("datasets/test/dark/01.png", "dark"), (DARK, "dark")]


def test_a_path_with_a_line_break_is_one_csv_row():
    rows = list(csv.reader(io.StringIO(to_csv(Failure("a\nb.png", "broken"), 1))))
    assert rows == [[r"a\nb.png", "", "", "", "broken"]]


def test_paths_on_standard_input_may_be_any_bytes(trained, tmp_path):
    name = os.fsencode(tmp_path) + b"/\xff.png"
    shutil.copy(DARK, name)
    command = [sys.executable, ROOT / "predict.py", "--json", "-"]
    result = subprocess.run(
        command, input=name + b"\r\n", capture_output=True, env=os.environ | {"PYTHONPATH": str(ROOT)}
    )
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["label"] == "dark"


def test_terminal_output_is_a_table_or_bars(trained, tmp_path):
    def in_terminal(*args: str) -> str:
        main, terminal = pty.openpty()
        process = subprocess.Popen(
            [sys.executable, ROOT / "predict.py", *args],
            stdout=terminal,
            stderr=subprocess.DEVNULL,
            env=os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "60"},
        )
        os.close(terminal)
        output = b""
        try:
            while chunk := os.read(main, 4096):
                output += chunk
        except OSError:  # the end of a pseudo-terminal
            pass
        assert process.wait(60) == 0
        return output.decode()

    rows = in_terminal("datasets/test").splitlines()
    assert len(rows) == 11
    assert max(map(display_width, rows)) <= 60
    assert rows[0].startswith("dark ") and rows[0].endswith("00.png")
    save_checkpoint(tmp_path / "wide.pth", load_checkpoint(find_checkpoint("")) | {"class_names": ["苹果手机壳", "b"]})
    rows = in_terminal("--model-path", str(tmp_path / "wide.pth"), "datasets/test").splitlines()
    assert rows[0].startswith("苹果手机壳 ")
    bars = in_terminal(DARK).splitlines()
    assert bars[0] == DARK
    assert [bar.split()[0] for bar in bars[1:]] == ["dark", "light"]


def test_sort_into_never_overwrites(trained, tmp_path):
    images = tmp_path / "in"
    for folder, source in (("a", DARK), ("b", "datasets/test/dark/01.png"), ("c", LIGHT)):
        (images / folder).mkdir(parents=True)
        shutil.copy(source, images / folder / "same.png")
    out = tmp_path / "out"
    for _ in range(2):  # the second run changes nothing
        assert predict.main((str(images),), sort_into=str(out)) == 0
        assert sorted(str(path.relative_to(out)) for path in out.rglob("*.png")) == [
            "dark/same.png",
            "dark/same_2.png",
            "light/same.png",
        ]
    assert (out / "dark/same.png").read_bytes() == Path(DARK).read_bytes()
    assert (out / "dark/same_2.png").read_bytes() == Path("datasets/test/dark/01.png").read_bytes()
    assert len(list(images.rglob("*.png"))) == 3


def test_rejected_images_are_sorted_into_unknown(trained, tmp_path, capsys):
    assert predict.main((DARK,), sort_into=str(tmp_path), reject_below="1") == 0
    assert [path.parent.name for path in tmp_path.rglob("*.png")] == [UNKNOWN]
    assert "unknown, low probability" in capsys.readouterr().out


def test_folder_names_are_unique_and_stay_in_their_folder(tmp_path):
    labels = ["../../up", "/etc", "..", "a\\b", "a/b", "a_b", "A_B", "C:", "", "x" * 300, "x\x00", "猫" * 200, "."]
    names = folder_names([*labels, "dark"])
    assert names["dark"] == "dark" and names.keys() == {*labels, "dark"}
    assert len({name.casefold() for name in names.values()}) == len(names)
    (tmp_path / "p.png").write_bytes(b"1")
    for name in names.values():
        copy = copy_into(str(tmp_path / "p.png"), tmp_path / "out" / name)
        assert copy.resolve().parent.parent == (tmp_path / "out").resolve()
        assert copy.read_bytes() == b"1"


def test_a_class_called_unknown_excludes_rejection(trained, tmp_path):
    content = load_checkpoint(find_checkpoint(""))
    del content["format_version"]
    save_checkpoint(tmp_path / "model.pth", content | {"class_names": ["dark", UNKNOWN]})
    with pytest.raises(ValueError, match="a class is named unknown"):
        predict.main((DARK,), model_path=str(tmp_path / "model.pth"), reject_below="0.5")
    assert predict.main((DARK,), model_path=str(tmp_path / "model.pth")) == 0


def test_explain_adds_maps_to_saved_images(trained, tmp_path):
    predict.main((DARK, LIGHT), save=str(tmp_path / "plain"))
    predict.main((DARK, LIGHT), save=str(tmp_path / "explained"), explain=True)
    plain, explained = (Image.open(tmp_path / folder / "00.png") for folder in ("plain", "explained"))
    assert explained.height == plain.height
    assert np.array_equal(np.asarray(explained)[:224, : plain.width], np.asarray(plain)[:224])
    side = open_image(DARK).height * (plain.width // open_image(DARK).width)
    assert explained.width == plain.width + 2 * side  # two square maps on the right
    bars = np.asarray(explained)[side:]
    for left in (0, plain.width, plain.width + side):  # each has a title
        assert bars[:, left : left + side].max() > 200
    assert len(list((tmp_path / "explained").iterdir())) == 2


def test_explain_without_save_has_a_default_folder(trained, tmp_path, monkeypatch):
    copy = shutil.copy(find_checkpoint(""), tmp_path / "model.pth")
    shutil.copy(DARK, tmp_path / "dark.png")
    monkeypatch.chdir(tmp_path)
    predict.main(("dark.png",), model_path=str(copy), explain=True)
    assert (tmp_path / predict.EXPLAINED / "dark.png").is_file()


def test_rejection_auto_prints_its_cost(trained, tmp_path, capsys):
    predict.main((DARK,), reject_below="auto")
    message = capsys.readouterr().err
    assert "of 4 validation images" in message and "° from all classes" in message
    predict.main((DARK,), reject_below="auto", tta=True)
    assert "the threshold and these figures are without --tta" in capsys.readouterr().err
    write_image(tmp_path / "black.png", 0)
    for rejected, raw in ((True, False), (False, True)):
        predict.main((str(tmp_path / "black.png"),), reject_below="0.1", raw=raw)
        printed, message = capsys.readouterr()
        assert ("unknown" in printed) == rejected
        assert ("° from all classes" in message, "unlike all classes are not detected" in message) == (rejected, raw)


def test_rejection_needs_a_number_or_a_finished_run(trained, tmp_path, capsys):
    for wrong in ("1.1", "-0.1", "nan", "often"):
        with pytest.raises(ValueError, match="give auto, or a number from 0 to 1"):
            predict.main((DARK,), reject_below=wrong)
    with pytest.raises(ValueError, match="needs a calibrated checkpoint, and raw is set"):
        predict.main((DARK,), reject_below="auto", raw=True)
    with pytest.raises(ValueError, match="max_error=1"):
        predict.main((DARK,), reject_below="auto", max_error=1.0)
    content = load_checkpoint(find_checkpoint(""))
    del content["format_version"]
    save_checkpoint(tmp_path / "stopped.pth", content | {"calibration": {}})
    with pytest.raises(ValueError, match="only the best one of a finished run is"):
        predict.main((DARK,), model_path=str(tmp_path / "stopped.pth"), reject_below="auto")
    predict.main((DARK,), model_path=str(tmp_path / "stopped.pth"), reject_below="0.5")
    assert "unlike all classes are not detected" in capsys.readouterr().err


def test_contradictory_flags(trained):
    with pytest.raises(ValueError, match="choose one"):
        predict.main((DARK,), json_lines=True, csv_lines=True)
    with pytest.raises(ValueError, match=r"sort_into='cls_val\.txt': it is a file"):
        predict.main((DARK,), sort_into="cls_val.txt")


def test_stream_requests_images_lazily(classifier, tmp_path):
    """Results are yielded before all images have been requested."""
    requested = []

    def paths():
        for i in range(500):
            requested.append(i)
            yield DARK if i % 2 else LIGHT

    predictions = classifier.stream(paths(), batch_size=8)
    first = next(predictions)
    assert first.label == "light" and len(requested) < 50
    assert [prediction.label for prediction in predictions] == ["dark", "light"] * 249 + ["dark"]


def test_predictions_do_not_depend_on_the_batch_size(classifier):
    paths = [write_image(Path(f"images/{i}.png"), 40 + 20 * i, seed=i) for i in range(9)]
    one, many = (classifier.predict(paths, batch_size=size) for size in (1, 4))
    torch.testing.assert_close(
        torch.tensor([a.probability for a in one]), torch.tensor([a.probability for a in many]), atol=1e-6, rtol=1e-5
    )


def test_copies_are_made_where_times_and_permissions_cannot_be_set(here, monkeypatch):
    """As on some USB drives and network shares."""

    def refuse(*arguments: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(shutil, "copystat", refuse)
    write_image(here / "p.png")
    assert copy_into("p.png", here / "out").read_bytes() == (here / "p.png").read_bytes()
