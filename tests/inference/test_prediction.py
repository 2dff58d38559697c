"""Daily use: predict.py's ways in and out, the library's `predict`, and how answers are told."""

import csv
import io
import json
import os
import pty
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import predict
from tests.conftest import write_image
from utils.data.image_io import ImageError, open_image
from utils.inference.classifier import Classifier, load_classifier
from utils.inference.prediction import (
    Failure,
    Prediction,
    display_width,
    shorten,
    to_bars,
    to_csv,
    to_json,
    to_line,
    to_row,
)
from utils.inference.rejection import UNKNOWN, Calibration
from utils.inference.save_predictions import copy_into, folder_names
from utils.runs.checkpoint import find_checkpoint, load_checkpoint, save_checkpoint

ROOT = Path(__file__).resolve().parents[2]
DARK, LIGHT = "datasets/test/dark/00.png", "datasets/test/light/00.png"


@pytest.fixture
def classifier(trained):
    return load_classifier(find_checkpoint(""), "cpu")


def test_paths_images_and_arrays_are_alike(classifier):
    image = open_image(DARK)
    inputs = [DARK, Path(DARK), image, np.asarray(image), np.asarray(image)[..., 0]]
    answers = classifier.predict(inputs)
    assert [answer.label for answer in answers] == ["dark"] * 5
    assert [answer.path for answer in answers] == [DARK, DARK, "", "", ""]
    assert [answer.probability for answer in answers[:4]] == pytest.approx([answers[0].probability] * 4, abs=1e-6)
    (alone,) = classifier.predict(DARK)
    assert dict(alone.classes) == pytest.approx(dict(answers[0].classes), abs=1e-6)
    assert sum(p for _, p in answers[0].classes) == pytest.approx(1)
    assert len(classifier.predict(DARK, top_k=1)[0].classes) == 1
    assert classifier.predict([]) == []


def test_a_image_on_its_side_is_turned_and_left_as_it_was(classifier, tmp_path):
    image = open_image(DARK)
    exif = Image.Exif()
    exif[274] = 6
    image.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "side.png", exif=exif)
    with Image.open(tmp_path / "side.png") as lying:
        size = lying.size
        (answer,) = classifier.predict(lying)
        assert lying.size == size
    assert answer.probability == pytest.approx(classifier.predict(image)[0].probability, abs=1e-6)


@pytest.mark.parametrize(
    "array",
    [np.zeros((4, 4, 3)), np.zeros((4, 4, 4), np.uint8), np.zeros((2, 4, 4, 3), np.uint8), np.zeros((0, 4), np.uint8)],
)
def test_arrays_that_mean_something_else_are_refused(classifier, array):
    with pytest.raises(ValueError, match=r"give uint8 from 0 to 255, \(height, width, 3\) in RGB or \(height, width\)"):
        classifier.predict(array)


def test_what_is_no_image_and_numbers_that_cannot_be(classifier, tmp_path):
    for wrong in ([5], [None], [torch.zeros(3, 4, 4)]):
        with pytest.raises(ValueError, match="give a path, an Pillow image, or a numpy array"):
            classifier.predict(wrong)
    for wrong in ({"batch_size": 0}, {"top_k": 0}):
        with pytest.raises(ValueError, match="whole numbers from 1 up"):
            classifier.predict(DARK, **wrong)
    (tmp_path / "half.png").write_bytes(Path(DARK).read_bytes()[:400])
    with Image.open(tmp_path / "half.png") as half:
        first, second = classifier.stream([half, LIGHT])
    assert isinstance(first, Failure) and "half.png" in first.error
    assert second.label == "light"


def test_views_are_judged_by_the_distance_of_their_own_image(classifier, monkeypatch):
    """Brightness stands in for the network, and for the distance."""
    told = []

    class Noting:
        def reason(self, probability, distance):
            told.append(distance)
            return ""

    def brightness(_, pixels):
        return pixels.float().mean(dim=(1, 2, 3))[:, None], torch.zeros(len(pixels), 2)

    monkeypatch.setattr(Classifier, "forward", brightness)
    monkeypatch.setattr(Calibration, "distances", lambda _, embeddings: embeddings[:, 0])
    classifier.predict([DARK, LIGHT, DARK], tta=True, rejection=Noting())
    assert told == pytest.approx([60, 190, 60], abs=10)


def test_an_unreadable_file_is_an_error_or_a_failure(classifier, tmp_path):
    (tmp_path / "broken.jpg").write_text("no image")
    with pytest.raises(ImageError, match=r"broken\.jpg can't be read"):
        classifier.predict([DARK, tmp_path / "broken.jpg"])
    first, second, third = classifier.stream([DARK, tmp_path / "broken.jpg", LIGHT])
    assert (first.label, third.label) == ("dark", "light")
    assert isinstance(second, Failure) and second.path.endswith("broken.jpg")


def test_views_are_averaged(classifier):
    from utils.inference.tta_views import TTAViews

    (answer,) = classifier.predict(LIGHT, tta=True)
    views = TTAViews(classifier.preprocessing, mirror=True)
    pixels = classifier._read(LIGHT, views)
    expected = classifier.probabilities(pixels).mean(dim=0)
    assert dict(answer.classes) == pytest.approx(dict(zip(["dark", "light"], expected.tolist(), strict=True)), abs=1e-6)


def test_answers_are_rejected_with_the_reason(classifier):
    from utils.inference.rejection import Rejection

    (answer,) = classifier.predict(DARK, rejection=Rejection(1.0))
    assert answer.label == UNKNOWN and answer.rejected
    assert answer.reason.startswith("not sure enough: ")
    assert answer.classes[0][0] == "dark"
    (answer,) = classifier.predict(DARK, rejection=Rejection(0.0, farthest=-1.0))
    assert answer.reason.startswith("unlike all classes: ")
    (answer,) = classifier.predict(DARK, rejection=Rejection(0.0))
    assert answer.label == "dark" and not answer.rejected


def test_what_is_printed_steers_no_terminal():
    answer = Prediction("a\x1b]0;x\x07.jpg", "\x1b[31mbee", 0.9, (("\x1b[31mbee", 0.9), ("ant", 0.1)))
    told = [to_line(answer), to_line(Failure(answer.path, "\x07")), to_bars(answer, 60), to_line(answer)]
    told.append(predict.summarise(Counter([answer.label, "ant"])))
    assert not any(sign in line for line in told for sign in "\x1b\x07")


def test_how_an_answer_is_told():
    answer = Prediction("a b.png", "cat", 0.9, (("cat", 0.9), ("dog, big", 0.1)))
    assert to_line(answer) == "a b.png: cat 90.0%  (dog, big 10.0%)"
    assert json.loads(to_json(answer)) == {
        "path": "a b.png",
        "label": "cat",
        "predictions": [{"class": "cat", "probability": 0.9}, {"class": "dog, big", "probability": 0.1}],
    }
    rejected = Prediction("x.png", UNKNOWN, 0.6, (("cat", 0.6),), "not sure enough")
    assert to_line(rejected) == "x.png: unknown, not sure enough  (else cat 60.0%)"
    assert json.loads(to_json(rejected))["reason"] == "not sure enough"
    assert to_line(Failure("x", "x is broken")) == "x: error: x is broken"
    row = next(csv.reader(io.StringIO(to_csv(answer, 3))))
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
    answer = Prediction("a/very/long/path/" * 6 + "end.png", name, 0.87, ((name, 0.87), ("other", 0.13)))
    lines = [*to_bars(answer, width).splitlines(), to_row(answer, width, min(24, width // 3))]
    assert max(map(display_width, lines)) <= width
    assert lines[-1].endswith("end.png")
    likely, unlikely = (line.count("█") for line in lines[1:3])
    assert likely > 4 * unlikely
    rejected = Prediction("p.png", UNKNOWN, 0.6, ((name, 0.6),), "not sure enough")
    assert "unknown?" in to_row(rejected, width, 10) and display_width(to_row(rejected, width, 10)) <= width
    failure = Failure("x.png", "x.png can't be read as an image " * 5)
    assert display_width(to_row(failure, width, 10)) <= width


def test_text_is_shortened_to_columns():
    assert shorten("abcdef", 4) == "abc…"
    assert shorten("abcdef", 4, keep_end=True) == "…def"
    assert shorten("猫犬鳥", 4) == "猫…"
    assert shorten("abc", 3) == "abc"


def test_csv_and_a_list_on_standard_input(trained, command):
    result = command("predict.py", "--csv", "-", input=f"{DARK}\ndatasets/test/light\n\nnone.png\n")
    assert result.returncode == 1
    rows = list(csv.DictReader(io.StringIO(result.stdout)))
    assert [row["path"] for row in rows] == [DARK, *(f"datasets/test/light/{i:02d}.png" for i in range(5)), "none.png"]
    assert [row["label"] for row in rows] == ["dark"] + ["light"] * 5 + [""]
    assert rows[0]["class_1"] == "dark" and rows[0]["class_2"] == "light"
    assert "no such file" in rows[-1]["note"]
    assert "7 images: 5 as light, 1 as dark; 1 without an answer" in result.stderr


def test_standard_input_beside_other_paths(trained, command):
    result = command("predict.py", "--json", LIGHT, "-", DARK, input="datasets/test/dark/01.png\n-\n")
    labels = [(json.loads(line)["path"], json.loads(line)["label"]) for line in result.stdout.splitlines()]
    assert labels == [(LIGHT, "light"), ("datasets/test/dark/01.png", "dark"), (DARK, "dark")]


def test_a_name_with_a_line_break_is_one_row_of_csv():
    rows = list(csv.reader(io.StringIO(to_csv(Failure("a\nb.png", "broken"), 1))))
    assert rows == [["a\nb.png", "", "", "", "broken"]]


def test_names_on_standard_input_may_be_any_bytes(trained, tmp_path):
    name = os.fsencode(tmp_path) + b"/\xff.png"
    shutil.copy(DARK, name)
    command = [sys.executable, ROOT / "predict.py", "--json", "-"]
    result = subprocess.run(
        command, input=name + b"\r\n", capture_output=True, env=os.environ | {"PYTHONPATH": str(ROOT)}
    )
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["label"] == "dark"


def test_a_terminal_gets_a_table_and_bars(trained, tmp_path):
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
            while part := os.read(main, 4096):
                output += part
        except OSError:  # how a terminal says that it's over
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


def test_sorting_copies_and_never_overwrites(trained, tmp_path):
    images = tmp_path / "in"
    for folder, source in (("a", DARK), ("b", "datasets/test/dark/01.png"), ("c", LIGHT)):
        (images / folder).mkdir(parents=True)
        shutil.copy(source, images / folder / "same.png")
    out = tmp_path / "out"
    for _ in range(2):  # a second time changes nothing
        assert predict.main((str(images),), sort_into=str(out)) == 0
        assert sorted(str(path.relative_to(out)) for path in out.rglob("*.png")) == [
            "dark/same.png",
            "dark/same_2.png",
            "light/same.png",
        ]
    assert (out / "dark/same.png").read_bytes() == Path(DARK).read_bytes()
    assert (out / "dark/same_2.png").read_bytes() == Path("datasets/test/dark/01.png").read_bytes()
    assert len(list(images.rglob("*.png"))) == 3


def test_what_is_rejected_is_sorted_into_unknown(trained, tmp_path, capsys):
    assert predict.main((DARK,), sort_into=str(tmp_path), reject_below="1") == 0
    assert [path.parent.name for path in tmp_path.rglob("*.png")] == [UNKNOWN]
    assert "unknown, not sure enough" in capsys.readouterr().out


def test_a_class_name_leads_nowhere_else(tmp_path):
    labels = [
        "../../up",
        "/etc",
        "..",
        "a\\b",
        "a/b",
        "a_b",
        "A_B",
        "C:",
        "",
        "x" * 300,
        "x\x00",
        "猫" * 200,
        ".",
        "con",
        "aux.a",
    ]
    names = folder_names([*labels, "dark"])
    assert names["dark"] == "dark" and names.keys() == {*labels, "dark"}
    assert len({name.casefold() for name in names.values()}) == len(names)
    assert names["con"] != "con"
    (tmp_path / "p.png").write_bytes(b"1")
    for name in names.values():
        copy = copy_into(str(tmp_path / "p.png"), tmp_path / "out" / name)
        assert copy.resolve().parent.parent == (tmp_path / "out").resolve()
        assert copy.read_bytes() == b"1"


def test_a_class_called_unknown_cannot_be_told_from_a_rejection(trained, tmp_path):
    content = load_checkpoint(find_checkpoint(""))
    del content["format_version"]
    save_checkpoint(tmp_path / "model.pth", content | {"class_names": ["dark", UNKNOWN]})
    with pytest.raises(ValueError, match="there is a class called unknown"):
        predict.main((DARK,), model_path=str(tmp_path / "model.pth"), reject_below="0.5")
    assert predict.main((DARK,), model_path=str(tmp_path / "model.pth")) == 0


def test_images_are_explained(trained, tmp_path):
    predict.main((DARK, LIGHT), save=str(tmp_path / "plain"))
    predict.main((DARK, LIGHT), save=str(tmp_path / "explained"), explain=True)
    plain, explained = (Image.open(tmp_path / folder / "00.png") for folder in ("plain", "explained"))
    assert explained.height == plain.height
    assert np.array_equal(np.asarray(explained)[:224, : plain.width], np.asarray(plain)[:224])
    side = open_image(DARK).height * (plain.width // open_image(DARK).width)
    assert explained.width == plain.width + 2 * side  # two square maps beside it
    bars = np.asarray(explained)[side:]
    for left in (0, plain.width, plain.width + side):  # each has its title
        assert bars[:, left : left + side].max() > 200
    assert len(list((tmp_path / "explained").iterdir())) == 2


def test_to_be_explained_is_to_be_saved(trained, tmp_path, monkeypatch):
    copy = shutil.copy(find_checkpoint(""), tmp_path / "model.pth")
    shutil.copy(DARK, tmp_path / "dark.png")
    monkeypatch.chdir(tmp_path)
    predict.main(("dark.png",), model_path=str(copy), explain=True)
    assert (tmp_path / predict.EXPLAINED / "dark.png").is_file()


def test_rejection_auto_says_what_it_costs(trained, tmp_path, capsys):
    predict.main((DARK,), reject_below="auto")
    told = capsys.readouterr().err
    assert "of 4 validation images" in told and "° from all classes" in told
    predict.main((DARK,), reject_below="auto", tta=True)
    assert "with --tta probabilities are lower" in capsys.readouterr().err
    write_image(tmp_path / "black.png", 0)
    for rejected, raw in ((True, False), (False, True)):
        predict.main((str(tmp_path / "black.png"),), reject_below="0.1", raw=raw)
        answer, told = capsys.readouterr()
        assert ("unknown" in answer) == rejected
        assert ("° from all classes" in told, "nothing is known of distances" in told) == (rejected, raw)


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
    assert "nothing is known of distances" in capsys.readouterr().err


def test_flags_that_contradict_each_other(trained):
    with pytest.raises(ValueError, match="choose one"):
        predict.main((DARK,), json_lines=True, csv_lines=True)
    with pytest.raises(ValueError, match=r"sort_into='cls_val\.txt': it is a file"):
        predict.main((DARK,), sort_into="cls_val.txt")


def test_reading_goes_on_while_thousands_are_answered(classifier, tmp_path):
    """Answers come before all images have been asked for."""
    asked = []

    def paths():
        for i in range(500):
            asked.append(i)
            yield DARK if i % 2 else LIGHT

    answers = classifier.stream(paths(), batch_size=8)
    first = next(answers)
    assert first.label == "light" and len(asked) < 50
    assert [answer.label for answer in answers] == ["dark", "light"] * 249 + ["dark"]


def test_library_results_do_not_depend_on_the_batch(classifier):
    paths = [write_image(Path(f"images/{i}.png"), 40 + 20 * i, seed=i) for i in range(9)]
    one, many = (classifier.predict(paths, batch_size=size) for size in (1, 4))
    torch.testing.assert_close(
        torch.tensor([a.probability for a in one]), torch.tensor([a.probability for a in many]), atol=1e-6, rtol=1e-5
    )


def test_copies_go_where_times_and_permissions_are_refused(here, monkeypatch):
    """As on a stick, or a share."""

    def refuse(*arguments: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(shutil, "copystat", refuse)
    write_image(here / "p.png")
    assert copy_into("p.png", here / "out").read_bytes() == (here / "p.png").read_bytes()
