"""eval.py and predict.py on a trained checkpoint, as commands and as functions."""

import copy
import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import nn

import eval as evaluation
import export
import predict
from nets.weights.digest import digest_file
from tests.conftest import NAMES, write_image
from utils.data.dataset import FileSource, ImageDataset
from utils.data.image_io import open_image
from utils.data.image_list import read_classes, read_list, write_classes
from utils.data.loader import eval_loader
from utils.evaluation.corruptions import CORRUPTIONS
from utils.inference.classifier import load_classifier
from utils.inference.image_paths import expand
from utils.inference.outputs import compute_outputs
from utils.inference.prediction import Prediction
from utils.inference.save_predictions import save_labeled
from utils.modeling.pixel_network import cast_for_inference
from utils.runs.checkpoint import BEST, LAST, find_checkpoint, load_checkpoint, save_checkpoint
from utils.system import cli
from utils.training.predict_logits import predict_logits

ROOT = Path(__file__).resolve().parents[1]


def run(script: str, *args: str, env: dict | None = None, **options) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | (env or {})
    return subprocess.run(
        [sys.executable, ROOT / script, *args], capture_output=True, text=True, env=environment, timeout=120, **options
    )


def test_validation_evaluation_and_prediction_agree(trained, tmp_path, capsys):
    """The three ways to a probability: the training loop's validation, eval.py's loader, predict.py's images."""
    checkpoint = find_checkpoint("")
    row = load_checkpoint(checkpoint)["history"][load_checkpoint(checkpoint)["epoch"]]
    for raw in (True, False):
        evaluation.main(data="cls_val.txt", out=str(tmp_path), batch_size=3, raw=raw)
        metrics = json.loads((tmp_path / "metrics.json").read_text())
        assert metrics["raw"]["log_loss"] == pytest.approx(row["val_loss"], rel=1e-5, abs=1e-5)
        assert (metrics["log_loss"] == metrics["raw"]["log_loss"]) == raw
        assert metrics["top1"] == row["val_top1"]

    classifier = load_classifier(checkpoint, "cpu")
    images = read_list("cls_val.txt", 2)
    dataset = ImageDataset(FileSource(images, classifier.preprocessing), classifier.transform, seed=0)
    loader = eval_loader(dataset, 3, num_workers=0)
    logits, _ = predict_logits(classifier.network, loader, classifier.device, classifier.precision)
    paths = [images.path(i) for i in range(len(images))]
    one_by_one = torch.cat([classifier.probabilities(classifier.load(path)[None]) for path in paths])
    in_memory = classifier.probabilities(classifier.transform(open_image(paths[0]))[None])
    torch.testing.assert_close(in_memory, one_by_one[:1], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close((logits / classifier.temperature).softmax(1), one_by_one, atol=1e-6, rtol=1e-5)

    capsys.readouterr()
    predict.main(tuple(paths), json_lines=True)
    printed = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    for answer, expected in zip(printed, one_by_one.tolist(), strict=True):
        assert {p["class"]: p["probability"] for p in answer["predictions"]} == pytest.approx(
            dict(zip(["dark", "light"], expected, strict=True)), abs=1e-6
        )


def test_eval_command(trained, tmp_path):
    result = run("eval.py", "--out", str(tmp_path))
    assert result.returncode == 0, result.stderr
    assert "best_epoch_weights.safetensors on cls_test.txt" in result.stdout
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["images"] == 11
    assert [row["support"] for row in metrics["per_class"]] == [6, 5]
    low, high = metrics["intervals"]["top1"]
    assert f"top-1 {metrics['top1']:.2%} [{100 * low:.2f}, {100 * high:.2f}]" in result.stdout
    rows = list(csv.reader((tmp_path / "confusion_matrix.csv").open()))
    assert rows[0] == ["true \\ predicted", "dark", "light"]
    counts = np.array([[int(v) for v in row[1:]] for row in rows[1:]])
    assert counts.sum(axis=1).tolist() == [6, 5]
    assert counts.trace() / 11 == pytest.approx(metrics["top1"])
    assert metrics["corruptions"].keys() == {"none", *CORRUPTIONS}
    assert metrics["corruptions"]["none"] == metrics["top1"]
    assert min(Image.open(tmp_path / "confusion_matrix.png").size) > 100
    predictions = list(csv.DictReader((tmp_path / "predictions.csv").open()))
    assert len(predictions) == 11
    right = [row["truth"] == row["prediction"] for row in predictions]
    assert sum(right) / 11 == pytest.approx(metrics["top1"])
    for row in predictions:
        assert float(row["probability"]) + float(row["probability_2"]) == pytest.approx(1, abs=1e-5)
        assert float(row["margin"]) == pytest.approx(float(row["probability"]) - float(row["probability_2"]), abs=1e-5)


def test_a_weight_that_is_standardised_first_is_not_cast():
    network = nn.Sequential(timm.layers.StdConv2d(3, 4, 3), nn.Conv2d(4, 4, 3))
    assert [layer.weight.dtype for layer in cast_for_inference(network, "bf16")] == [torch.float32, torch.bfloat16]


def test_figures_are_of_the_file_that_was_opened(trained, tmp_path, monkeypatch):
    """Of a run that is going on, which saves a better epoch meanwhile."""
    checkpoint = Path(shutil.copy(find_checkpoint(""), tmp_path / "a.pth"))
    opened = digest_file(checkpoint)

    def infer(*args, **options):
        checkpoint.write_bytes(b"another")
        return compute_outputs(*args, **options)

    monkeypatch.setattr(evaluation, "compute_outputs", infer)
    evaluation.main(model_path=str(checkpoint), out=str(tmp_path), corrupted=0)
    assert json.loads((tmp_path / "metrics.json").read_text())["checkpoint_sha256"] == opened


def test_evaluating_a_folder_and_a_list_is_the_same(trained, tmp_path):
    evaluation.main(data="datasets/test", out=str(tmp_path / "folder"))
    evaluation.main(data="cls_test.txt", out=str(tmp_path / "list"))
    read = [json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("folder", "list")]
    assert [metrics.pop("data") for metrics in read] == ["datasets/test", "cls_test.txt"]
    assert read[0] == read[1]


def test_a_folder_that_lacks_a_class_is_evaluated_and_said(trained, tmp_path, capsys):
    shutil.copytree("datasets/test/dark", tmp_path / "data" / "dark")
    evaluation.main(data=str(tmp_path / "data"), out=str(tmp_path))
    assert "No images, so excluded from the averages: light" in capsys.readouterr().out


def test_other_classes_are_refused(trained, tmp_path):
    classes = tmp_path / "classes.txt"
    classes.write_text("dark\nred\n")
    with pytest.raises(ValueError, match=r"only in .*classes\.txt: red; only in the checkpoint: light"):
        evaluation.main(classes_path=str(classes), out=str(tmp_path))
    classes.write_text("light\ndark\n")
    with pytest.raises(ValueError, match="the same in another order"):
        evaluation.main(classes_path=str(classes), out=str(tmp_path))
    write_image(tmp_path / "data" / "red" / "1.png")
    with pytest.raises(ValueError, match=r"only in .*data: red"):
        evaluation.main(data=str(tmp_path / "data"), out=str(tmp_path))
    with pytest.raises(ValueError, match="give the one that does, such as datasets/test"):
        evaluation.main(data="datasets", out=str(tmp_path))
    with pytest.raises(FileNotFoundError, match="there is no class file model_data/cls_class"):
        evaluation.main(classes_path="model_data/cls_class.txt", out=str(tmp_path))


def test_what_cannot_be_written_to_is_known_first(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluation, "compute_outputs", lambda *args, **options: pytest.fail("hours"))
    (tmp_path / "file").touch()
    for options in ({}, {"compare": ("logs", "logs")}):
        with pytest.raises(OSError, match=r"nothing can be written to .*give another with --out"):
            evaluation.main(out=str(tmp_path / "file" / "out"), **options)


def test_nan_logits_are_a_failure(trained, tmp_path, capsys):
    content = load_checkpoint(find_checkpoint(""))
    weights = {name: torch.full_like(tensor, torch.nan) for name, tensor in content["weights"].items()}
    content = {key: value for key, value in content.items() if key != "format_version"}
    save_checkpoint(tmp_path / "a.pth", content | {"weights": weights})
    assert predict.main(("datasets/test/dark/00.png",), model_path=str(tmp_path / "a.pth"), json_lines=True) == 1
    assert "output isn't finite" in json.loads(capsys.readouterr().out)["error"]
    with pytest.raises(ValueError, match=r"\.png, one of 11 affected images: the network's output isn't finite"):
        evaluation.main(model_path=str(tmp_path / "a.pth"), out=str(tmp_path))


def test_a_checkpoint_is_all_that_is_needed(trained, tmp_path, monkeypatch, capsys):
    shutil.copy(find_checkpoint(""), tmp_path / "model.pth")
    shutil.copytree("datasets/test", tmp_path / "images")
    monkeypatch.chdir(tmp_path)
    evaluation.main(data="images", model_path="model.pth")
    assert predict.main(("images",), model_path="model.pth") == 0
    assert len([line for line in capsys.readouterr().out.splitlines() if line.startswith("images/")]) == 11


def test_predict_command_on_files_folders_and_globs(trained, command):
    result = command("predict.py", "datasets/test/dark/00.png", "datasets/test/light", "datasets/test/*/0[12].png")
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert len(lines) == 1 + 5 + 4
    assert "10 images: " in result.stderr and " as dark" in result.stderr
    assert lines[0].startswith("datasets/test/dark/00.png: dark ")
    assert lines[1].startswith("datasets/test/light/00.png: light ")
    assert BEST in result.stderr


def test_predict_json_and_unreadable_files(trained, tmp_path, command):
    (tmp_path / "broken.jpg").write_text("no image")
    result = command(
        "predict.py", "--json", "--top-k", "1", "none.jpg", str(tmp_path / "broken.jpg"), "datasets/test/light/00.png"
    )
    assert result.returncode == 1
    answers = [json.loads(line) for line in result.stdout.splitlines()]
    assert [set(answer) for answer in answers] == [{"path", "error"}] * 2 + [{"path", "label", "predictions"}]
    assert "none.jpg can't be read" in answers[0]["error"]
    assert [p["class"] for p in answers[2]["predictions"]] == ["light"]


def test_predict_asks_for_images(trained, command):
    result = command("predict.py", input="datasets/test/dark/00.png\nnone.jpg\ndatasets/test/light/00.png\n\n")
    lines = result.stdout.splitlines()
    assert len(lines) == 3
    assert "dark" in lines[0]
    assert "error" in lines[1]
    assert "light" in lines[2]
    assert result.returncode == 1


def test_typed_paths_are_classified_one_by_one(trained, monkeypatch, capsys):
    printed = []

    def ask_for_paths():
        for path in ("datasets/test/dark/00.png", "datasets/test/light/00.png"):
            yield path
            printed.append(capsys.readouterr().out)

    monkeypatch.setattr(predict, "ask_for_paths", ask_for_paths)
    predict.main()
    assert ["dark/00" in printed[0], "light/00" in printed[1]] == [True, True]


def test_saved_images_have_a_label_and_overwrite_nothing(trained, tmp_path):
    before = {path: path.read_bytes() for path in Path("datasets").rglob("*.png")}
    for _ in range(2):
        predict.main(("datasets/test/dark/00.png", "datasets/test/light/00.png"), save=str(tmp_path / "out"))
    saved = sorted((tmp_path / "out").iterdir())
    assert [path.name for path in saved] == ["00.png", "00_2.png", "00_3.png", "00_4.png"]
    assert before == {path: path.read_bytes() for path in Path("datasets").rglob("*.png")}
    labeled = np.asarray(Image.open(saved[0]))
    original = np.asarray(open_image("datasets/test/dark/00.png"))
    scale = labeled.shape[1] // original.shape[1]
    assert np.array_equal(labeled[: original.shape[0] * scale : scale, ::scale], original)
    bar = labeled[original.shape[0] * scale :]
    assert bar.min() == 0
    assert bar.max() == 255
    assert labeled.shape[1] >= 224


@pytest.mark.parametrize("name", ["猫", "Tomato leaf with yellow curl virus, early", "\udcff"])
def test_labels_fit_their_bar_and_differ(here, name):
    image = Image.new("RGB", (224, 224), "white")
    for label in (name, "other"):
        save_labeled(image, Prediction(f"{label}.png", label, 0.5, ((label, 0.5),)), here)
    bars = [np.asarray(Image.open(path))[224:] for path in sorted(here.iterdir())]
    assert not np.array_equal(*bars)
    assert all(bar[:, -4:].max() == 0 for bar in bars)


def test_a_model_comes_first_and_alone(trained, tmp_path, capsys):
    """A run that comes first is the model; anything of a run is never taken for an image."""
    run = find_checkpoint("").parent
    image = "datasets/test/dark/00.png"
    for model in (run, run / BEST, "logs"):
        assert predict.main((str(model), image), json_lines=True) == 0
        result, text = capsys.readouterr()
        assert [json.loads(line)["path"] for line in result.splitlines()] == [image]
        assert f"checkpoint {run / BEST}" in text
    for model in (str(run), str(run / LAST), "model.pt2", "model.onnx"):
        with pytest.raises(ValueError, match="a model among the images; give the model first"):
            predict.main((image, model))
        with pytest.raises(ValueError, match="there are two models"):
            predict.main((model, image), model_path="logs")
    with pytest.raises(ValueError, match=r"doesn't read \.pt2"):
        predict.main(("model.pt2", image))
    shutil.copytree("logs", tmp_path / "all/logs")
    shutil.copy(image, tmp_path / "all")
    assert [Path(path).name for path in expand([str(tmp_path / "all")])] == ["00.png"]
    assert "plots of runs" in capsys.readouterr().err
    evaluation.main(str(run), corrupted=0, out=str(tmp_path))
    with pytest.raises(ValueError, match="there are two models"):
        evaluation.main(str(run), model_path="logs")
    for data in ("datasets/test", "cls_test.txt"):
        with pytest.raises(ValueError, match=f"it is no checkpoint or run; give images as --data {data}"):
            evaluation.main(data)
        with pytest.raises(ValueError, match=f"give images as --data {data}"):
            export.main(data)


@pytest.mark.parametrize("workers", ["0", "1"])
def test_an_unreadable_image_in_a_list_is_one_line(trained, tmp_path, workers, command):
    (tmp_path / "list.txt").write_text(f"0;{trained}/datasets/test/dark/00.png\n1;broken.jpg\n")
    (tmp_path / "broken.jpg").write_text("no image")
    result = command("eval.py", "--data", str(tmp_path / "list.txt"), "--num-workers", workers)
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    message = result.stderr.splitlines()[-1]
    assert message.startswith(f"error: {tmp_path}/broken.jpg can't be read as an image: its image format is unknown")
    assert message.endswith("run python txt_annotation.py with the same flags and --fix")


def test_no_such_data_and_a_file_to_save_in(trained, tmp_path):
    with pytest.raises(FileNotFoundError, match="no list or folder none"):
        evaluation.main(data="none")
    with pytest.raises(ValueError, match=r"out='cls_val\.txt': it is a file"):
        evaluation.main(out="cls_val.txt", compare=("logs", "logs"))
    with pytest.raises(ValueError, match=r"save='cls_val\.txt': it is a file"):
        predict.main(("datasets/test/dark/00.png",), save="cls_val.txt")


def test_a_closed_pipe_has_no_traceback(trained):
    command = f"{sys.executable} {ROOT / 'predict.py'} datasets/train datasets/train datasets/train | head -1"
    result = subprocess.run(
        command, shell=True, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)}
    )
    assert len(result.stdout.splitlines()) == 1
    assert "Traceback" not in result.stderr


def test_load_classifier_from_a_run_folder(trained):
    assert load_classifier(next(Path("logs").iterdir()), "cpu").class_names == ["dark", "light"]


def test_eval_falls_back_to_the_validation_list(trained, tmp_path, monkeypatch, capsys):
    run = find_checkpoint("").parent.resolve()
    for name in ("datasets", "model_data", "logs"):
        shutil.copytree(name, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    evaluation.main(corrupted=0)
    assert "on cls_test.txt" in capsys.readouterr().out
    copy = find_checkpoint("").parent
    (copy / "test_list.txt").unlink()
    evaluation.main(corrupted=0)
    assert "on cls_val.txt" in capsys.readouterr().out
    shutil.copy(trained / "cls_test.txt", tmp_path)
    evaluation.main(corrupted=0)
    assert "on cls_test.txt" in capsys.readouterr().out
    shutil.rmtree("datasets")
    with pytest.raises(FileNotFoundError, match=r"first image of the run's list, isn't in this working folder.*--data"):
        evaluation.main(model_path=str(run), corrupted=0)


def test_a_run_is_evaluated_on_its_own_test_list_and_other_results_are_kept(trained, tmp_path, monkeypatch, capsys):
    """Lists of another project in the working folder don't matter."""
    for name in ("datasets", "logs"):
        shutil.copytree(name, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    write_classes("model_data/cls_classes.txt", ["apple", "pear", "plum"])
    Path("cls_test.txt").write_text("2;plum.jpg\n")
    run = find_checkpoint("").parent
    evaluation.main(str(run), corrupted=0)
    output = capsys.readouterr().out
    assert "cls_test.txt has changed since the run started" in output
    assert "11 images" in output
    assert read_classes(run / "classes.txt") == NAMES
    evaluation.main(str(run), data="datasets/train", corrupted=0)
    data = [json.loads((folder / "metrics.json").read_text())["data"] for folder in (run, run / "eval/datasets_train")]
    assert data == ["cls_test.txt", "datasets/train"]
    with pytest.raises(ValueError, match=r"only in model_data/cls_classes\.txt: apple, pear, plum"):
        evaluation.main(str(run), data="cls_test.txt")


def test_eval_names_what_it_passes_over(trained, tmp_path, capsys):
    shutil.copytree("datasets/test", tmp_path / "data")
    (tmp_path / "data" / "dark" / "1.txt").touch()
    (tmp_path / "data" / "loose.jpg").touch()
    evaluation.main(data=str(tmp_path / "data"), out=str(tmp_path))
    output = capsys.readouterr().out
    assert "skipped: 1 not an image (.txt) (dark)" in output
    assert "skipped: 1 outside the class folders" in output


def test_paths_that_the_terminal_cannot_encode(trained, tmp_path):
    shutil.copy("datasets/test/dark/00.png", tmp_path / "猫.png")
    result = run("predict.py", str(tmp_path / "猫.png"), env={"PYTHONIOENCODING": "cp1252"})
    assert result.returncode == 0, result.stderr
    assert r"\u732b.png: dark" in result.stdout


def test_top_k_is_checked(trained):
    with pytest.raises(ValueError, match="top_k=0"):
        predict.main(("datasets/test/dark/00.png",), top_k=0)
    assert predict.main(("datasets/test/dark/00.png",), top_k=50) == 0


def test_predictions_are_in_the_order_of_the_paths(trained, capsys):
    paths = tuple(f"datasets/train/{name}/{i:02d}.png" for i in range(16) for name in ("light", "dark")) * 2 + (
        "no.png",
    )
    assert predict.main(paths, json_lines=True) == 1
    assert [json.loads(line)["path"] for line in capsys.readouterr().out.splitlines()] == list(paths)


def test_predict_imports_no_slow_package(trained):
    script = (
        "import sys; sys.path.insert(0, sys.argv[1]); import predict; predict.main(('datasets/test/dark/00.png',))\n"
        "print(*sorted({name.partition('.')[0] for name in sys.modules}))"
    )
    command = [sys.executable, "-c", script, str(Path(predict.__file__).parent)]
    *_, modules = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert {"torch", "PIL"} <= set(modules.split())
    unneeded = {
        "onnx",
        "onnxruntime",
        "tensorboard",
        "matplotlib",
        "sklearn",
        "scipy",
        "torchvision",
        "pandas",
        "imagehash",
        "jinja2",
        "timm",
    }
    assert unneeded.isdisjoint(modules.split())


def test_cast_weights_give_the_same_logits_as_autocast(trained):
    checkpoint, *_ = Path("logs").glob(f"*/{BEST}")
    pixels = torch.randint(0, 256, (4, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    plain = load_classifier(checkpoint, "cpu")
    assert plain.precision == "fp32"
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        expected = plain.network(pixels)
        cast = cast_for_inference(copy.deepcopy(plain.network), "bf16")
        assert torch.equal(cast(pixels), expected)
    assert {p.dtype for p in cast.parameters()} == {torch.float32, torch.bfloat16}


@pytest.mark.parametrize("names", [["a", "a"], ["\ud800", "b"], [1, 2], ["a"]])
def test_invalid_class_names_are_refused(trained, tmp_path, names):
    content = load_checkpoint(find_checkpoint("")) | {"class_names": names}
    del content["format_version"]
    save_checkpoint(tmp_path / "w.pth", content)
    with pytest.raises(ValueError, match=r"w\.pth can't be used: .*class.names"):
        load_classifier(tmp_path / "w.pth", "cpu")


@pytest.mark.parametrize("change", [{"input_shape": [10**5, 10**5]}, {"max_pixels": -1}, {"eval_crop": "x"}])
def test_invalid_preprocessing_is_refused(trained, tmp_path, change):
    content = load_checkpoint(find_checkpoint(""))
    del content["format_version"]
    content["preprocessing"] |= change
    save_checkpoint(tmp_path / "w.pth", content)
    with pytest.raises(ValueError, match=r"w\.pth can't be used: .*preprocessing"):
        load_classifier(tmp_path / "w.pth", "cpu")


def test_nothing_trained_yet(here, command):
    result = run("eval.py", cwd=here)
    assert result.returncode == 1
    (message,) = result.stderr.splitlines()
    assert message.startswith("error: there is no best_epoch_weights.safetensors in a run in logs/: train first")
    assert message.endswith("train first, python train.py")
    result = command("predict.py", "a.jpg")
    assert result.returncode == 1
    assert "a.jpg can't be read as an image: there is no such file" in result.stdout + result.stderr


def test_a_value_that_cannot_work_on_the_command_line(here, command):
    result = command("train.py", "--init-lr", "0")
    assert result.returncode == 1
    assert result.stderr == "error: init_lr=0.0: must be above 0\n"


def test_what_is_printed_does_not_steer_the_terminal(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["x"])
    text = "class \x1b[2J\u202egpj\u2029: 3\ttabs, ü, \u732b\n"
    escaped = "class \\x1b[2J\\u202egpj\\u2029: 3\ttabs, ü, \u732b\n"
    for is_terminal in (False, True):
        monkeypatch.setattr(sys.stdout, "isatty", lambda is_terminal=is_terminal: is_terminal)
        cli.run(lambda: print(f"\x1b[1m{text}\x1b[A", end=""))
        assert capsys.readouterr().out == f"\\x1b[1m{escaped}\\x1b[A"
        cli.run(lambda: print("\n\x1b[A", end=""))  # of a progress bar
        assert capsys.readouterr().out == "\n\x1b[A"


def test_a_fault_inside_a_library_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["x"])
    with pytest.raises(ValueError, match="Expecting value"):
        cli.run(lambda: json.loads("no json"))
