"""Output files of an evaluation, and the report page in a real browser."""

import csv
import json
import re
import shutil
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.sparse import csr_array
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import eval as evaluation_script
from nets.factory import build_model
from tests.conftest import SMALL, open_page, settings, wait_for_property, write_image
from utils.data.image_list import list_in_memory, select
from utils.data.preprocessing import Preprocessing
from utils.data.transforms import EvalTransform
from utils.evaluation.evaluation import Evaluation, evaluate_corrupted
from utils.evaluation.gallery import Gallery, shown_images
from utils.evaluation.mistakes import worst_mistakes
from utils.evaluation.plots import MAX_CLASSES, plot_confusion
from utils.evaluation.report_files import EVENTS_FOLDER, format_metrics, write_csv, write_events, write_metrics
from utils.evaluation.report_page import (
    MAX_LABEL_ERRORS,
    MAX_WORST,
    confusion_cells,
    label_gallery,
    learning_curves,
    render,
    slice_tables,
)
from utils.inference.classifier import Classifier
from utils.inference.explain import explain_one
from utils.inference.fit_calibration import TrainEmbeddings
from utils.inference.outputs import Outputs
from utils.inference.rejection import fit_calibration
from utils.inference.thumbnails import THUMBNAIL, to_uri
from utils.modeling.pixel_network import PixelNetwork
from utils.runs.checkpoint import BEST, LAST, find_checkpoint, load_checkpoint, save_checkpoint
from utils.runs.log import EPOCHS

AWKWARD = [
    "$x^2$",
    "a,b",
    "猫",
    "<script>alert(1)</script>",
    "\udcff",
    "x" * 80,
    '"><img src=x onerror=alert(1)>',
    "{{ 7 * 7 }}",
]


def make_evaluation(folder: Path, names: list[str], n: int = 60, files: int = 12, accuracy: float = 2.0) -> Evaluation:
    """An evaluation of `n` images from `files` files, with random logits."""
    generator = torch.Generator().manual_seed(0)
    config = settings(input_shape=(16, 16), eval_crop=1.0, freeze_epoch=3, unfreeze_epoch=8)
    preprocessing = Preprocessing.from_config(config)
    model = build_model("vit_xs_4", len(names), (16, 16))
    class_ids = torch.arange(n) % len(names)
    paths = [write_image(folder / "images" / f"<b>{i}&.png", 20 * (i % 12), (20 + i, 16), i) for i in range(files)]
    images = list_in_memory((int(k), str(paths[i % files])) for i, k in enumerate(class_ids))
    logits = torch.randn(n, len(names), generator=generator) + accuracy * F.one_hot(class_ids, len(names))
    embeddings = torch.randn(n, 192, generator=generator) + 3 * torch.eye(192)[class_ids % 192]
    calibration = fit_calibration(logits, embeddings, class_ids, embeddings, class_ids)
    network = PixelNetwork(model, preprocessing, torch.device("cpu")).eval()
    transform = EvalTransform(preprocessing)
    classifier = Classifier(
        *(network, preprocessing, transform, names, torch.device("cpu"), "fp32", calibration.temperature, calibration),
        config=config.as_dict(),
    )
    run = folder / "run"
    run.mkdir(exist_ok=True)
    with (run / EPOCHS).open("w", newline="") as file:
        writer = csv.writer(file)
        calibrated = ("val_calibrated_loss", "val_calibrated_loss_error")
        writer.writerow(["epoch", "loss", "top1", "val_loss", "val_top1", *calibrated])
        writer.writerows([e, 2 / e, 1 - 1 / e, 2.2 / e, 1 - 1.1 / e, 2.1 / e, 0.0] for e in range(1, 9))
    outputs = Outputs(logits, embeddings, class_ids, torch.rand(n, generator=generator), torch.arange(n))
    ood = Outputs(
        logits[: n // 2] / 3, -embeddings[: n // 2], class_ids[: n // 2], torch.rand(n // 2), torch.arange(n // 2)
    )
    corrupted = {"none": (9, 10), "blur": (7, 10)}
    (run / BEST).touch()
    return Evaluation(run / BEST, "", "<i>list</i>.txt", classifier, images, outputs, corrupted, ood, 0.05)


def make_page(folder: Path, names: list[str], n: int = 60, **options) -> Path:
    evaluation = make_evaluation(folder, names, n, **options)
    train = TrainEmbeddings(evaluation.images, evaluation.outputs.embeddings)
    evaluation.metrics["notes"].append("A note, <b>escaped</b>")
    page = folder / "report.html"
    page.write_text(render(evaluation, train), encoding="utf-8")
    return page


def test_awkward_class_names_in_all_files(here):
    evaluation = make_evaluation(here, AWKWARD)
    (here / "out").mkdir()
    write_metrics(here / "out", evaluation)
    read = json.loads((here / "out" / "metrics.json").read_text())
    assert [row["class"] for row in read["per_class"]] == AWKWARD
    rows = list(csv.reader((here / "out" / "confusion_matrix.csv").open(encoding="utf-8")))
    assert rows[0][1:5] == AWKWARD[:4]
    counts = np.array([row[1:] for row in rows[1:]], dtype=int)
    assert counts.sum() == 60 and counts.trace() / 60 == pytest.approx(read["top1"])
    predictions = list(csv.DictReader((here / "out" / "predictions.csv").open(encoding="utf-8")))
    assert len(predictions) == 60
    assert {"class_5", "probability_5"} <= predictions[0].keys() and "class_6" not in predictions[0]
    table = format_metrics(read)
    assert all(name.encode("utf-8", "backslashreplace").decode() in table for name in AWKWARD)


def test_confusion_matrix_of_many_classes_is_in_long_form(here):
    """Nothing grows with the square of the classes: 8,000 of them would be a matrix of 500 MB."""
    names = [f"class {i}" for i in range(8000)]
    evaluation = make_evaluation(here, names, n=16)
    tracemalloc.start()
    write_metrics(here, evaluation)
    assert confusion_cells(evaluation.scores.confusion)["rows"]
    plot_confusion(evaluation.scores.confusion, names)
    assert len(evaluation.metrics["notes"]) and all(len(note) < 1000 for note in evaluation.metrics["notes"])
    assert tracemalloc.get_traced_memory()[1] < 200e6
    tracemalloc.stop()
    header, *rows = csv.reader((here / "confusion_matrix.csv").open(encoding="utf-8"))
    assert header == ["true", "predicted", "count"]
    assert sum(int(count) for *_, count in rows) == 16
    assert sum(int(count) for true, predicted, count in rows if true == predicted) == 16 * evaluation.metrics["top1"]


def test_rejection_metrics(here):
    evaluation = make_evaluation(here, ["a", "b", "c"], n=300)
    rejection = evaluation.metrics["rejection"]
    accepted = rejection["accepted"]
    assert rejection["max_error"] == 0.05 and 0 < accepted < 1 and rejection["ood"] == 150
    assert rejection["error"] <= 0.05  # the threshold was chosen on these images
    assert rejection["ood_rejected"] > 1 - accepted  # OOD images have lower probabilities and opposite embeddings
    assert f"OOD images: {rejection['ood_rejected']:.1%} of 150 rejected" in format_metrics(evaluation.metrics)
    assert 0 < rejection["min_probability"] < 1 and 0 < rejection["max_distance"] < 180
    assert evaluation.rejection(0.5)["accepted"] >= accepted


def test_table_of_many_classes_has_the_lowest_f1(here):
    lines = format_metrics(make_evaluation(here, [f"class {i}" for i in range(81)], n=400).metrics).splitlines()
    assert lines[0].startswith("the 20 classes with the lowest F1")
    assert len(lines) < 35


def test_report_and_tensorboard_events_of_a_run(trained, capsys):
    (run,) = trained.glob("logs/*")
    (run / EVENTS_FOLDER).mkdir(exist_ok=True)
    (run / EVENTS_FOLDER / "mine.txt").touch()  # must not be deleted
    for _ in range(2):
        evaluation_script.main(ood="datasets/train/dark")
    assert sorted(path.name for path in (run / EVENTS_FOLDER).iterdir() if "tfevents" not in path.name) == ["mine.txt"]
    printed = capsys.readouterr().out
    assert f"open {run.relative_to(trained)}/report.html" in printed
    assert "inference" in printed
    events = EventAccumulator(str(run / EVENTS_FOLDER)).Reload()
    assert "confusion matrix" in events.Tags()["images"]
    assert "_hparams_/session_start_info" in events.summary_metadata
    metrics = json.loads((run / "metrics.json").read_text())
    (value,) = events.Scalars("evaluation/top1")  # once, though it was evaluated twice
    assert value.value == pytest.approx(metrics["top1"])
    assert list(csv.DictReader((run / EPOCHS).open()))[-1]["epoch"] == "4"


def test_warnings_on_the_page(trained, tmp_path):
    evaluation_script.main(data="cls_train.txt", out=str(tmp_path), raw=True)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "36 of the 36 images were trained on" in page
    assert "raw was set" in page
    evaluation_script.main(data="datasets/test", out=str(tmp_path))
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "were trained on" not in page


def test_unknown_overlap_with_the_training_list_is_reported(trained, tmp_path, monkeypatch):
    shutil.copytree("datasets/train", tmp_path / "moved")
    run = shutil.copytree(find_checkpoint("").parent, tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    evaluation_script.main(data="moved", model_path=str(run), out="out", corrupted=0)
    (note,) = json.loads(Path("out/metrics.json").read_text())["notes"]
    assert note.startswith("It is unknown whether these images were trained on")
    shutil.copytree("moved", "datasets/train")
    shutil.copytree(trained / "datasets/test", "datasets/test")
    shutil.move("datasets/train/dark/00.png", "datasets/test/dark/new.png")  # now unknown for one image
    evaluation_script.main(data="datasets/test", model_path=str(run), out="out", corrupted=0)
    assert json.loads(Path("out/metrics.json").read_text())["notes"] == [note]
    evaluation_script.main(data="datasets/train", model_path=str(run), out="out", corrupted=0)
    notes = json.loads(Path("out/metrics.json").read_text())["notes"]
    assert [re.sub(r"\d+", "N", text)[:38] for text in notes] == [
        "N of the N images were trained on: res",
        "N of the N images are in the validatio",
        "It is unknown whether more of these im",
    ]


def test_folder_with_only_a_config_is_not_a_run(trained, tmp_path):
    for name in ("config.json", "evaluation/thesis.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}")
    evaluation_script.main(out=str(tmp_path))
    assert [path.name for path in (tmp_path / "evaluation").iterdir()] == ["thesis.txt"]


def test_worst_mistakes_in_tensorboard(here):
    evaluation = make_evaluation(here, ["a", "b", "c"], accuracy=0.5)
    worst = worst_mistakes(evaluation.scores, MAX_WORST)
    assert len(worst) > 10
    images = shown_images(evaluation, worst)
    assert len(images) == len(worst)
    write_events(here, evaluation, plot_confusion(csr_array(np.eye(3, dtype=int)), ["a", "b", "c"]), images)
    images = EventAccumulator(str(here / EVENTS_FOLDER), size_guidance={"images": 0}).Reload()
    assert sum(tag.startswith("worst mistakes") for tag in images.Tags()["images"]) >= 1


def test_mistakes_have_their_maps_and_nearest_training_image(here):
    evaluation = make_evaluation(here, ["a", "b", "c"], accuracy=0.5)
    order = torch.randperm(60, generator=torch.Generator().manual_seed(3))
    train = TrainEmbeddings(select(evaluation.images, order.numpy()), evaluation.outputs.embeddings[order])
    gallery = Gallery(evaluation, train)
    worst = worst_mistakes(evaluation.scores, MAX_WORST)
    figures = gallery.figures(worst, explained=True)
    for index, figure in zip(worst, figures, strict=True):
        # Each image was trained on, so it is its own nearest.
        assert figure["nearest"]["path"] == figure["path"] == evaluation.images.path(index)
        assert figure["nearest"]["class"] == figure["truth"]
        pixels = evaluation.classifier.load(evaluation.images.path(index))
        expected = explain_one(evaluation.classifier, pixels, int(evaluation.scores.predicted[index]), THUMBNAIL)
        assert [shown["title"] for shown in figure["maps"]] == list(expected)
        assert [shown["image"] for shown in figure["maps"]] == [to_uri(image) for image in expected.values()]
    assert len({figure["maps"][1]["image"] for figure in figures}) > len(figures) // 3


def test_planted_label_errors_are_on_the_page(here):
    evaluation = make_evaluation(here, ["a", "b", "c"], n=200, accuracy=9.0)
    evaluation.outputs.class_ids[:9] = (evaluation.outputs.class_ids[:9] + 1) % 3
    labels = label_gallery(Gallery(evaluation, None))
    assert 6 <= labels["count"] == len(labels["figures"]) <= 12
    planted = {evaluation.images.path(i) for i in range(9)}
    assert len(planted & {figure["path"] for figure in labels["figures"]}) >= 6


def test_accuracy_by_image_property(here):
    """The images are 16 high and 20 to 31 wide."""
    short, shape, brightness = slice_tables(make_evaluation(here, ["a", "b", "c"]))
    assert [row["range"] for row in short["rows"]] == ["16"]
    assert shape["rows"][0]["range"].startswith("1.25 to") and shape["rows"][-1]["range"].endswith("to 1.94")
    assert sum(row["count"] for row in brightness["rows"]) == 60


def test_corruptions_apply_to_the_network_input(here, monkeypatch):
    evaluation = make_evaluation(here, ["a", "b", "c"], n=12)
    monkeypatch.setattr("utils.evaluation.evaluation.CORRUPTIONS", {"black": lambda pixels, _: pixels * 0})
    corrupted = evaluate_corrupted(evaluation.classifier, evaluation.images, evaluation.outputs, 12, 0, 4)
    black = evaluation.classifier.forward(torch.zeros(1, 3, 16, 16, dtype=torch.uint8))[1].argmax()
    assert corrupted["black"] == (int((evaluation.outputs.class_ids == black).sum()), 12)
    assert corrupted["none"] == (int(evaluation.raw_scores.correct.sum()), 12)


def test_overlap_with_the_validation_list_is_reported(trained, tmp_path, capsys):
    evaluation_script.main(data="cls_val.txt", out=str(tmp_path))
    assert "4 of the 4 images are in the validation list" in capsys.readouterr().out


def test_ood_folder_must_have_images(trained, tmp_path):
    with pytest.raises(FileNotFoundError, match="ood='none'"):
        evaluation_script.main(ood="none", out=str(tmp_path))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="the folder has no images"):
        evaluation_script.main(ood=str(tmp_path / "empty"), out=str(tmp_path))
    with pytest.raises(ValueError, match="can't reject"):
        evaluation_script.main(ood="datasets/test", raw=True, out=str(tmp_path))


def test_unreadable_ood_images_are_skipped_with_a_warning(trained, tmp_path, capsys):
    ood = tmp_path / "ood"
    write_image(ood / "whole.png")
    (ood / "broken.jpg").write_text("no image")
    evaluation_script.main(ood=str(ood), out=str(tmp_path), corrupted=0, num_workers=0)
    assert f"warning: unreadable OOD image skipped: {ood}/broken.jpg" in capsys.readouterr().out
    assert json.loads((tmp_path / "metrics.json").read_text())["rejection"]["ood"] == 1
    (ood / "whole.png").unlink()
    with pytest.raises(ValueError, match="ood: none of the 1 images can be read"):
        evaluation_script.main(ood=str(ood), out=str(tmp_path), corrupted=0, num_workers=0)


def test_report_of_a_checkpoint_outside_a_run(trained, tmp_path, monkeypatch):
    shutil.copy(find_checkpoint(""), tmp_path / "model.pth")
    shutil.copytree("datasets/test", tmp_path / "images")
    monkeypatch.chdir(tmp_path)
    evaluation_script.main(data="images", model_path="model.pth")
    assert (tmp_path / "metrics_out" / "report.html").is_file()
    assert not (tmp_path / "metrics_out" / EVENTS_FOLDER).exists()


def test_uncalibrated_checkpoint_has_no_nearest_training_images(trained, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(find_checkpoint("").parent, run)
    save_checkpoint(run / LAST, load_checkpoint(run / LAST) | {"calibration": {}})
    for name, other in (("dark", "light"), ("light", "dark")):
        shutil.copytree(f"datasets/test/{other}", tmp_path / "all_wrong" / name)
    options = {"data": str(tmp_path / "all_wrong"), "out": str(tmp_path), "corrupted": 0, "num_workers": 0}
    for name, calibrated in ((BEST, True), (LAST, False)):
        evaluation_script.main(model_path=str(run / name), **options)
        page = (tmp_path / "report.html").read_text(encoding="utf-8")
        assert "mistakes, the highest loss first" in page
        assert ("Probabilities are not calibrated" in page) == (not calibrated)
        assert ("the most similar of 36 training images" in page) == calibrated


@pytest.fixture(scope="module")
def awkward_page(tmp_path_factory) -> Path:
    """A page of classes with awkward names."""
    return make_page(tmp_path_factory.mktemp("awkward"), AWKWARD)


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "dark")])
def test_page_loads_without_errors(awkward_page, browser, width, scheme):
    page, errors, _ = open_page(browser, awkward_page, width, scheme)
    assert errors == []
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.evaluate("[...document.images].every(image => image.complete && image.naturalWidth > 0)")
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(20, 23, 29)"
    assert dark == (scheme == "dark")
    image = page.screenshot(full_page=True)
    assert len(image) > 50_000


def test_class_names_are_escaped(awkward_page, browser):
    page, errors, _ = open_page(browser, awkward_page)
    assert errors == []
    assert page.locator("img[src=x]").count() == 0
    assert page.locator("main script, main b b, header i").count() == 0
    names = page.locator("#classes tbody td.name").all_text_contents()
    assert names == [name.encode("utf-8", "backslashreplace").decode() for name in AWKWARD]
    assert "<i>list</i>.txt" in page.locator("header").inner_text()
    assert "<b>escaped</b>" in page.locator(".notes").inner_text()
    assert "<b>" in page.locator("#mistakes .path").first.inner_text()


def test_filter_and_sort_by_keyboard(here, browser):
    names = [f"class {i}" for i in range(6)]
    page, _, _ = open_page(browser, make_page(here, names))
    page.locator("#filter").focus()
    page.keyboard.type("class 3")
    assert page.locator("#filter").input_value() == "3"
    rows = page.locator("#classes tbody tr:visible")
    assert rows.count() == 1 and "class 3" in rows.first.inner_text()
    shown = page.locator("#mistakes figure:visible")
    assert 0 < shown.count() < page.locator("#mistakes figure").count()
    assert all("class 3" in text for text in shown.locator("figcaption").all_inner_texts())
    page.locator("#filter").select_option("")
    assert rows.count() == 6

    def recalls() -> list[float]:
        cells = "rows => rows.map(row => Number(row.cells[2].dataset.value))"
        return page.eval_on_selector_all("#classes tbody tr", cells)

    page.locator("#classes th button", has_text="Recall").focus()
    page.keyboard.press("Enter")
    assert recalls() == sorted(recalls(), reverse=True) and len(set(recalls())) > 1
    assert page.locator("#classes th[aria-sort=descending]").inner_text().strip().startswith("Recall")
    page.keyboard.press("Enter")
    assert recalls() == sorted(recalls())
    page.locator("#classes th button", has_text="Class").click()
    assert [text.strip() for text in page.locator("#classes td.name").all_text_contents()] == names


@pytest.mark.slow
def test_page_of_ten_thousand_images_loads_in_two_seconds(here, browser):
    path = make_page(here, [f"class {i}" for i in range(81)], n=10_000, accuracy=4.0)
    page, errors, seconds = open_page(browser, path)
    assert errors == [] and seconds < 2
    assert path.stat().st_size < 4e6
    assert page.locator("#mistakes > .gallery").first.locator("figure").count() == MAX_WORST
    assert page.locator("#labels figure").count() <= MAX_LABEL_ERRORS
    assert "The 24 of" in page.locator("#mistakes").inner_text()
    assert page.locator(".matrix tbody tr").count() == MAX_CLASSES
    assert "the 40 of 81 classes with the most mistakes" in page.locator("#confusion").inner_text()


def test_tables_that_do_not_fit_say_so(here, browser):
    page, _, _ = open_page(browser, make_page(here, [f"class {i}" for i in range(60)], n=2000, accuracy=4.0), 390)
    table = page.locator(".scroll", has=page.locator(".matrix"))
    assert "scroll in it" in table.locator("xpath=preceding-sibling::p").inner_text()
    wait_for_property(page, ".scroll:has(.matrix)", "className", "scroll more-right more-below")
    table.evaluate("table => table.scrollTo(1e6, 1e6)")
    wait_for_property(page, ".scroll:has(.matrix)", "className", "scroll")


@pytest.mark.slow
def test_page_of_a_thousand_classes(here, browser):
    page, errors, seconds = open_page(
        browser, make_page(here, [f"class {i}" for i in range(1000)], n=3000, accuracy=8.0)
    )
    assert errors == [] and seconds < 2
    assert page.locator("#classes tbody tr").count() == 1000


def test_end_of_the_frozen_stage_is_marked(here, browser):
    page, _, _ = open_page(browser, make_page(here, ["a", "b"]))
    assert page.locator("#training .thaw").count() == 2
    assert "thawed after epoch 3" in page.locator("#training").inner_text()


def test_page_without_mistakes(here, browser):
    page, errors, _ = open_page(browser, make_page(here, ["a", "b"], accuracy=50.0))
    assert errors == []
    assert "All images are classified correctly" in page.locator("#mistakes").inner_text()
    assert "None found" in page.locator("#labels").inner_text()


def test_symlinks_are_replaced_not_followed(here):
    """A run's folder of unknown origin may have links under the names of output files."""
    Path("mine.txt").write_text("mine")
    Path("predictions.csv").symlink_to("mine.txt")
    write_csv(Path("predictions.csv"), [["a", "b"], ["c\udcff", 1]])
    assert Path("mine.txt").read_text() == "mine"
    assert Path("predictions.csv").read_bytes() == b"a,b\r\nc\\udcff,1\r\n"


def test_learning_curves_only_of_a_complete_history():
    """An export in a run's folder has other settings, and epochs.csv may be of another run."""
    numbers = ("loss", "val_loss", "top1", "val_top1", "val_calibrated_loss", "val_calibrated_loss_error")
    epochs = [dict.fromkeys(numbers, 0.5) | {"epoch": i} for i in (1, 2, 3)]
    config = settings(**SMALL).as_dict()
    assert (learning_curves(epochs, config)["epochs"], learning_curves(epochs, config)["best"]) == (3, 3)
    crossing = [(0.9, 0.9), (0.8, 0.3), (0.2, 0.9)]  # validation loss and calibrated loss; the second selects
    keys = ("val_loss", "val_calibrated_loss", "val_calibrated_loss_error")
    rows = [row | dict(zip(keys, (*losses, 0.1), strict=True)) for row, losses in zip(epochs, crossing, strict=True)]
    assert learning_curves(rows, config)["best"] == 2
    assert learning_curves(rows, config)["plots"][0]["lines"] == {
        "train": "0.00,44.44 50.00,44.44 100.00,44.44",
        "val": "0.00,0.00 50.00,11.11 100.00,77.78",
        "calibrated": "0.00,0.00 50.00,66.67 100.00,0.00",
    }
    assert learning_curves(epochs, {"precision": "auto"}) is None
    assert learning_curves([epochs[0]] * 3, config) is None
    assert learning_curves([row | {"epoch": row["epoch"] + 5} for row in epochs], config) is None
