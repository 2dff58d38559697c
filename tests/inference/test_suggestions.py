"""`predict.py --suggest-labels`: which images to label next."""

import csv
import shutil
from pathlib import Path

import pytest
from PIL import Image

import predict
from tests.conftest import open_page, write_image
from utils.inference.classifier import load_classifier
from utils.inference.image_paths import drop_copies
from utils.runs.checkpoint import find_checkpoint
from utils.runs.folder import LIST_FILES


@pytest.fixture
def unlabeled(trained, tmp_path) -> Path:
    """Thirty images from dark to light, all different."""
    for i in range(30):
        write_image(tmp_path / "new" / f"{i:02d}.png", 60 + 4 * i, seed=100 + i)
    return tmp_path / "new"


def read_rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "suggestions.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def suggest(*paths: Path, out: Path, count: int = 5, **flags) -> tuple[int, list[dict[str, str]]]:
    status = predict.main(tuple(map(str, paths)), suggest_labels=count, out=str(out), device="cpu", **flags)
    return status, read_rows(out)


def test_the_smallest_margins_are_suggested(unlabeled, tmp_path, capsys):
    """Margins are those of `Classifier.predict`; CSV, page and copies have the same images."""
    status, rows = suggest(unlabeled, out=tmp_path / "out", sort_into=str(tmp_path / "sorted"))
    assert status == 0
    results = load_classifier(find_checkpoint(""), "cpu").predict(sorted(map(str, unlabeled.iterdir())), top_k=2)
    margins = {result.path: result.classes[0][1] - result.classes[1][1] for result in results}
    expected = sorted(results, key=lambda result: margins[result.path])[:5]
    assert [(row["path"], row["prediction"]) for row in rows] == [(image.path, image.label) for image in expected]
    assert [row["rank"] for row in rows] == list("12345")
    for row, image in zip(rows, expected, strict=True):
        assert float(row["probability"]) == pytest.approx(image.probability, abs=1e-6)
        assert float(row["margin"]) == pytest.approx(margins[image.path], abs=2e-6)
    copies = {(path.parent.name, path.name) for path in (tmp_path / "sorted").glob("*/*")}
    assert copies == {(image.label, Path(image.path).name) for image in expected}
    assert f"correct the folders in {tmp_path}/sorted, copy their images to" in capsys.readouterr().err
    page = (tmp_path / "out/suggestions.html").read_text(encoding="utf-8")
    assert page.count("data:image/jpeg;base64,") == 5
    assert all(Path(image.path).name in page for image in expected)


def test_suggestions_are_the_same_in_every_call_and_the_first_of_more(unlabeled, tmp_path):
    _, rows = suggest(unlabeled, out=tmp_path / "a")
    suggest(unlabeled, out=tmp_path / "b")
    for name in ("suggestions.csv", "suggestions.html"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    _, more = suggest(unlabeled, out=tmp_path / "c", count=15)
    assert rows == more[:5]
    assert len(more) == 15


def test_near_duplicates_are_suggested_once(unlabeled, tmp_path, capsys):
    """Of an image, its copy, and it in other sizes and formats, the least certain one is suggested; so is one of two
    blank images."""
    shutil.rmtree(unlabeled)
    for i in range(3):
        image = Image.effect_noise((64, 48), 90 + i).resize((256, 192), Image.Resampling.BICUBIC).convert("RGB")
        write_image(unlabeled / f"{i}.png").unlink()
        image.save(unlabeled / f"{i}.png")
        image.resize((200, 150)).save(unlabeled / f"{i}_small.png")
        image.save(unlabeled / f"{i}_again.jpg", quality=60)
    for name in ("blank", "blank_again"):
        Image.new("RGB", (80, 80), (120, 120, 120)).save(unlabeled / f"{name}.png")
    status, rows = suggest(unlabeled, out=tmp_path / "out", count=8)
    assert status == 0
    names = [Path(row["path"]).stem.split("_")[0] for row in rows]
    assert sorted(names) == ["0", "1", "2", "blank"]
    assert "there are no more: the other uncertain images are near-duplicates of these" in capsys.readouterr().err
    assert [float(row["margin"]) for row in rows] == sorted(float(row["margin"]) for row in rows)


def test_images_of_the_run_are_skipped_and_unreadable_ones_listed(unlabeled, tmp_path, capsys):
    run = find_checkpoint("").parent
    listed = [line.partition(";")[2] for line in (run / LIST_FILES["train"]).read_text().splitlines()]
    for i, path in enumerate(listed[:4]):
        shutil.copy(path, unlabeled / f"renamed {i}.png")
    (unlabeled / "damaged.png").write_bytes(b"\x89PNG\r\n\x1a\n damaged")
    status, rows = suggest(run, unlabeled, out=tmp_path / "out", count=100)
    output = capsys.readouterr()
    assert status == 1
    assert {Path(row["path"]).name for row in rows} == {f"{i:02d}.png" for i in range(30)}
    assert "skipped: 4 images of the run's lists" in output.err
    assert output.out.startswith(f"{unlabeled}/damaged.png: error: ") and output.out.count("\n") == 1
    assert f"train.py --continue {run}" in output.err and "txt_annotation.py" in output.err
    assert f"train.py --continue {run}" in (tmp_path / "out/suggestions.html").read_text(encoding="utf-8")


def test_copies_are_found_by_content(here):
    for name, content in {
        "a": b"1",
        "b": b"2",
        "c": b"33",
        "x/a": b"2",
        "x/d": b"1",
        "x/e": b"33",
        "x/f": b"34",
    }.items():
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_bytes(content)
    images = ["x/a", "x/d", "x/e", "x/f", "missing"]
    assert drop_copies(images, ["a", "c", "gone"]) == ["x/a", "x/f", "missing"]
    assert drop_copies(images, []) == images


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"csv_lines": True}, "suggest_labels: can't be combined with csv"),
        ({"json_lines": True, "tta": True}, "suggest_labels: can't be combined with json, tta"),
        ({"part": "1/2", "out": "a"}, "suggest_labels: can't be combined with part"),
        ({"merge": True, "out": "a"}, "suggest_labels: can't be combined with merge"),
        ({"save": "a"}, "suggest_labels: can't be combined with save"),
        ({"explain": True}, "suggest_labels: can't be combined with explain"),
        ({"reject_below": "0.5"}, "suggest_labels: can't be combined with reject_below"),
        ({"coverage": 0.9}, "suggest_labels: can't be combined with coverage"),
        ({"suggest_labels": 0}, "suggest_labels=0: give a whole number from 1 up"),
        ({"paths": ()}, "paths: suggest_labels needs them"),
        ({"out": "cls_train.txt"}, "out='cls_train.txt': it is a file; give a folder"),
        (
            {"model_path": "model.onnx"},
            "suggest_labels: not available for the ONNX file model.onnx; use its checkpoint",
        ),
    ],
)
def test_what_cannot_be_combined_is_refused_before_any_work(trained, flags, message):
    before = sorted(Path().iterdir())
    with pytest.raises(ValueError, match=message):
        predict.main(**{"paths": ("datasets/test",), "suggest_labels": 3} | flags)
    assert sorted(Path().iterdir()) == before


def test_the_page_has_no_errors(unlabeled, tmp_path, browser):
    write_image(unlabeled / "<b>.png", 110, seed=7)
    suggest(unlabeled, out=tmp_path / "out", count=40)
    for width, scheme in ((1280, "light"), (360, "dark")):
        page, errors, _ = open_page(browser, tmp_path / "out/suggestions.html", width, scheme)
        assert errors == []
        shown = page.evaluate("[...document.images].filter(image => image.naturalWidth > 0).length")
        assert shown == page.locator("figure").count() == 31
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        assert page.locator("figcaption", has_text="<b>.png").count() == 1
        page.close()
