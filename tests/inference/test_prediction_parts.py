"""`predict.py` in parts gives the file of `predict.py` in one, and refuses files that aren't of its parts."""

import json
import random
from pathlib import Path

import pytest

import predict
from utils.inference import prediction_parts
from utils.inference.output_formats import from_json, to_json
from utils.inference.prediction import Failure, Prediction
from utils.runs.checkpoint import LAST
from utils.system.part import Part

IMAGES = ("datasets/train", "missing.png", "datasets/test/light/00.png")


@pytest.fixture(autouse=True)
def small_batches(monkeypatch):
    """Several batches of the 42 images."""
    for module in (predict, prediction_parts):
        monkeypatch.setattr(module, "BATCH", 8)


def predict_parts(out: Path, count: int, **options) -> list[Path]:
    for number in random.Random(count).sample(range(1, count + 1), count):
        assert predict.main(IMAGES, out=str(out), part=f"{number}/{count}", **options) == 0
    return [Part(number, count).place(out) for number in range(1, count + 1)]


@pytest.mark.parametrize(
    ("count", "options"),
    [
        (3, {"json_lines": True}),
        (8, {"csv_lines": True, "reject_below": "auto"}),
        (2, {"json_lines": True, "tta": True, "top_k": 1, "reject_below": "0.9", "raw": True}),
    ],
)
def test_parts_give_the_same_file_as_one(count, options, trained, tmp_path, capfd):
    """Also if a part has no images, the parts are in any order, or one is run twice."""
    assert predict.main(IMAGES, **options) == 1
    printed = capfd.readouterr().out
    assert predict.main(IMAGES, out=str(tmp_path / "one"), **options) == 1
    assert (tmp_path / "one").read_text(encoding="utf-8") == printed
    files = predict_parts(tmp_path / "all.txt", count, **options)
    assert not (tmp_path / "all.txt").exists()
    before = files[1].read_bytes()
    predict.main(IMAGES, out=str(tmp_path / "all.txt"), part=f"2/{count}", **options)
    assert files[1].read_bytes() == before
    assert predict.main(IMAGES, out=str(tmp_path / "all.txt"), merge=True, **options) == 1
    assert (tmp_path / "all.txt").read_text(encoding="utf-8") == printed
    assert capfd.readouterr().out == ""


def test_the_merge_chooses_the_format_and_copies_images(trained, tmp_path):
    predict_parts(tmp_path / "all.csv", 2)
    options = {"csv_lines": True, "sort_into": str(tmp_path / "sorted"), "save": str(tmp_path / "saved")}
    predict.main(IMAGES, out=str(tmp_path / "all.csv"), merge=True, **options)
    assert len((tmp_path / "all.csv").read_text(encoding="utf-8").splitlines()) == 1 + 42
    assert len(list((tmp_path / "saved").iterdir())) == 41


@pytest.fixture
def merge(trained, tmp_path):
    """Merges two parts, whose files are there."""
    predict_parts(tmp_path / "all.jsonl", 2)
    out = str(tmp_path / "all.jsonl")
    return lambda images=IMAGES, **options: predict.main(images, out=out, merge=True, json_lines=True, **options)


def test_missing_parts_are_named(merge, tmp_path):
    (tmp_path / "all-1-of-2.jsonl").unlink()
    with pytest.raises(FileNotFoundError, match=r"parts 1/2 of .*all\.jsonl are missing; .* --part 1/2$"):
        merge()
    assert not (tmp_path / "all.jsonl").exists()


def test_parts_of_something_else_are_refused(merge):
    (run,) = Path("logs").iterdir()
    for options, fact in (
        ({"images": IMAGES[:2]}, "images"),
        ({"top_k": 1}, "top_k"),
        ({"tta": True}, "tta"),
        ({"raw": True}, "raw"),
        ({"reject_below": "0.5"}, "rejection"),
        ({"model_path": str(run / LAST)}, "model"),
    ):
        message = rf"all-1-of-2\.jsonl can't be used: it was made with another {fact}; run .* --part 1/2"
        with pytest.raises(ValueError, match=message):
            merge(**options)


def edit(lines: list[str], number: int, **changes) -> None:
    lines[number] = json.dumps(json.loads(lines[number]) | changes)


HOSTILE = {
    "empty": lambda lines: lines.clear(),
    "no header": lambda lines: lines.pop(0),
    "nested header": lambda lines: lines.__setitem__(0, "[" * 100_000),
    "header of another part": lambda lines: edit(lines, 0, part="1/2"),
    "a number as text": lambda lines: edit(lines, 0, batch_size="8"),
    "a bool as a number": lambda lines: edit(lines, 0, top_k=True),
    "a line is missing": lambda lines: lines.pop(1),
    "the last is missing": lambda lines: lines.pop(),
    "a line more": lambda lines: lines.append(lines[-1]),
    "no JSON": lambda lines: lines.__setitem__(2, "x"),
    "nested": lambda lines: lines.__setitem__(2, "[" * 100_000),
    "another image": lambda lines: edit(lines, 3, path="datasets/test/light/00.png"),
    "another class": lambda lines: edit(lines, 3, predictions=[{"class": c, "probability": 0.5} for c in "ab"]),
    "a class twice": lambda lines: edit(lines, 3, predictions=[{"class": "dark", "probability": 0.5}] * 2),
    "a class less": lambda lines: edit(lines, 3, predictions=json.loads(lines[3])["predictions"][:1]),
    "no classes": lambda lines: edit(lines, 3, predictions=[]),
    "a class is a list": lambda lines: edit(lines, 3, predictions=[{"class": ["dark"], "probability": 0.5}] * 2),
    "NaN": lambda lines: lines.__setitem__(3, lines[3].replace('"probability": ', '"probability": NaN, "x": ')),
    "above one": lambda lines: lines.__setitem__(3, lines[3].replace('"probability": ', '"probability": 1')),
    "another key": lambda lines: edit(lines, 3, more=1),
    "another label": lambda lines: edit(lines, 3, label="unknown"),
    "rejected": lambda lines: edit(lines, 3, label="unknown", reason="x"),
    "no text": lambda lines: lines.__setitem__(3, json.dumps({"path": json.loads(lines[3])["path"], "error": [1]})),
}


def test_hostile_files_are_refused(merge, tmp_path):
    file = tmp_path / "all-2-of-2.jsonl"
    original = file.read_text(encoding="utf-8").splitlines()
    message = r"all-2-of-2\.jsonl can't be used: .*; run the same command with --part 2/2"
    for name, change in HOSTILE.items():
        change(lines := list(original))
        file.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        with pytest.raises(ValueError, match=message):
            pytest.fail(f"{name}: {merge()}")
        assert not (tmp_path / "all.jsonl").exists(), name


def test_files_that_were_cut_off_are_refused(merge, tmp_path):
    file = tmp_path / "all-2-of-2.jsonl"
    content = file.read_bytes()
    for length in (0, 10, len(content) // 2, len(content) - 1):
        file.write_bytes(content[:length])
        with pytest.raises(ValueError, match=r"all-2-of-2\.jsonl can't be used: it was cut off"):
            merge()


def test_lines_of_any_text_are_read_back():
    for name in ("ä\udcff", "\x00\x1b\x7f\u202e\u2028", '"\\n'):
        prediction = Prediction(name, "b", 0.1 + 0.2, (("b", 0.1 + 0.2), (name, 1e-30)))
        for result in (prediction, Prediction(name, "unknown", 0.5, (("b", 0.5),), f"why {name}"), Failure(name, name)):
            assert from_json(to_json(result)) == result
            assert json.loads(to_json(result))["path"] == name
            assert to_json(result).isprintable()


def test_arguments(trained, tmp_path):
    for options, message in (
        ({"part": "1/2"}, "out: part and merge need it"),
        ({"part": "1/2", "merge": True, "out": "x"}, "part and merge: choose one"),
        ({"part": "1/2", "out": "x", "explain": True}, "can't be combined with save, explain or sort_into"),
        ({"part": "1/2", "out": "x", "paths": ()}, "paths: part and merge need them"),
        ({"out": str(tmp_path)}, "it is a folder"),
        ({"out": "cls_val.txt/x"}, "give another with --out"),
    ):
        with pytest.raises((ValueError, OSError), match=message):
            predict.main(**{"paths": IMAGES} | options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(predict.runtime, "world_size", 2)
        for paths in ((), ("-",)):
            with pytest.raises(ValueError, match="several processes don't read standard input"):
                predict.check_source(paths, in_parts=False)
        with pytest.raises(ValueError, match="merge: reads what is computed"):
            predict.check_parts("", merge=True, out="x", with_copies=False)
