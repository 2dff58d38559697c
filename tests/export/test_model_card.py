"""The model card that export.py writes."""

import dataclasses
import json
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

import eval as evaluation
import export
from nets.weights.seal import digest_file
from utils.export.formats import describe_export
from utils.export.model_card import CARD, check_card, escape, write_model_card
from utils.inference.classifier import load_classifier
from utils.runs.checkpoint import find_checkpoint

NAMES = ["a|b", "two\nlines", "<script>alert(1)</script>", "\x1b[31mred", "\udcff", "猫", "`x`", "[a](b)", "{{ 1 }}"]


@pytest.fixture
def own_run(trained, tmp_path):
    """A copy of the trained run, to write in, without what other tests had eval.py write."""
    run = tmp_path / "run"
    shutil.copytree(find_checkpoint("").parent, run, ignore=shutil.ignore_patterns("metrics*", "export"))
    return find_checkpoint(str(run))


def card_of(checkpoint, folder, **changes) -> str:
    classifier = dataclasses.replace(load_classifier(checkpoint, "cpu", precision="fp32"), **changes)
    facts = describe_export(classifier, checkpoint, "fp32")
    return write_model_card(folder, checkpoint, classifier, facts).read_text(encoding="utf-8")


def test_counts_figures_and_hashes(own_run, tmp_path, capsys):
    folder = tmp_path / "out"
    folder.mkdir()
    page = card_of(own_run, folder)
    assert "Not measured" in page
    evaluation.main(model_path=str(own_run), data="datasets/test", corrupted=0)
    (folder / "model.onnx").write_bytes(b"exported")
    digest = digest_file(own_run)
    report = {"checkpoint_sha256": digest, "sha256": digest_file(folder / "model.onnx")}
    (folder / "a`<script>.onnx").write_bytes(b"exported")  # by no name that export.py gives
    for name in ("model.onnx", "gone.pt2", "a`<script>.onnx"):
        (folder / f"{name}.check.json").write_text(json.dumps(report))
    page = card_of(own_run, folder)
    assert "| dark | 22 | 2 |" in page
    assert "| light | 14 | 2 |" in page
    metrics = json.loads(own_run.with_name("metrics.json").read_text())
    low, high = metrics["intervals"]["top1"]
    assert f"| top-1 | {metrics['top1']:.3f} ({low:.3f} to {high:.3f}) |" in page
    assert digest in page
    assert f"| model&#46;onnx | 0.00 MB | `{report['sha256']}` |" in page
    assert "gone" not in page
    assert "script" not in page
    assert "were trained on" not in page
    capsys.readouterr()
    evaluation.main(model_path=str(own_run), data="datasets/train", corrupted=0)
    assert f"what {own_run.parent} has of datasets/test is replaced" in capsys.readouterr().out
    page = card_of(own_run, folder)
    assert "- **36 of the 40 images were trained on&#58;" in page
    assert "- **4 of the 40 images are of the validation list&#44;" in page


@pytest.mark.parametrize(
    ("origin", "told"),
    [
        ({}, "was trained from scratch."),
        ({"file": "/home/me/w.pth"}, "began with weights that were trained elsewhere, out of a file, SHA-256 `abc`."),
        ({"file": "x", "repository": "a<b", "revision": "1"}, "elsewhere: a&#60;b, revision 1, SHA-256 `abc`."),
        ({"file": "x", "url": "x|y"}, "elsewhere: x&#124;y, SHA-256 `abc`."),
    ],
)
def test_where_it_began(own_run, tmp_path, origin, told):
    page = card_of(own_run, tmp_path, origin=origin | {"sha256": "abc"} if origin else {})
    assert told in page
    assert "/home" not in page


def test_files_and_figures_of_another_checkpoint_are_left_out(own_run, tmp_path):
    (tmp_path / "model.onnx").write_bytes(b"exported")
    report = {"checkpoint_sha256": "another", "sha256": digest_file(tmp_path / "model.onnx")}
    (tmp_path / "model.onnx.check.json").write_text(json.dumps(report))
    own_run.with_name("metrics.json").write_text(json.dumps({"checkpoint_sha256": "another"}))
    page = card_of(own_run, tmp_path)
    assert "Not measured" in page
    assert report["sha256"] not in page


def test_broken_reports_are_named(own_run, tmp_path):
    own_run.with_name("metrics.json").write_text(json.dumps({"checkpoint_sha256": digest_file(own_run), "data": []}))
    with pytest.raises(ValueError, match=r"metrics\.json isn't what eval\.py writes"):
        card_of(own_run, tmp_path)
    (tmp_path / "model.onnx.check.json").write_text("[]")
    with pytest.raises(ValueError, match=r"check\.json isn't what export\.py writes"):
        card_of(own_run, tmp_path)


def test_a_checkpoint_without_its_run(own_run, tmp_path, monkeypatch):
    alone = tmp_path / "alone" / "model.pth"
    alone.parent.mkdir()
    shutil.copy(own_run, alone)
    assert "| dark | not known | not known |" in card_of(alone, tmp_path)
    shutil.copytree("datasets/test", tmp_path / "test")
    monkeypatch.chdir(tmp_path)
    evaluation.main(model_path=str(alone), data="test", corrupted=0)
    page = card_of(alone, tmp_path)
    assert "Not measured" not in page
    assert "Whether the run has seen these images can&#39;t be told" in page


def test_only_a_card_gives_way_to_a_card(own_run, tmp_path):
    card_of(own_run, tmp_path)
    check_card(tmp_path)
    (tmp_path / "README.md").write_text("# My project")
    with pytest.raises(ValueError, match=r"README\.md is no model card, and would be overwritten"):
        export.main(model_path=str(own_run), out=str(tmp_path), format="safetensors", card=True)
    assert not (tmp_path / "model.safetensors").exists()


def test_class_names_break_nothing(own_run, tmp_path):
    for name in ("train_list.txt", "val_list.txt"):
        own_run.with_name(name).unlink()
    page = card_of(own_run, tmp_path, class_names=NAMES)
    assert "<" not in page.replace("<this checkpoint>", "")
    assert "\x1b" not in page
    table = page.partition("| class | training")[2].splitlines()[2 : 2 + len(NAMES)]
    assert [len(re.findall(r"\|", line)) for line in table] == [4] * len(NAMES)
    assert re.fullmatch(r"[A-Za-z0-9 &#;]+", "".join(map(escape, NAMES)))
    assert escape("a|b") == "a&#124;b"


@pytest.mark.parametrize("letterbox", [False, True])
def test_what_it_says_of_the_network(own_run, tmp_path, letterbox):
    classifier = load_classifier(own_run, "cpu")
    preprocessing = dataclasses.replace(classifier.preprocessing, letterbox_image=letterbox)
    page = card_of(own_run, tmp_path, preprocessing=preprocessing)
    assert ("grey bars" in page, "what lies at the edge isn't seen" in page) == (letterbox, not letterbox)
    assert "was trained from scratch" in page
    assert f"divided by {classifier.temperature:.3f}" in page
    assert "calibrated" in page
    assert "the network's own, not calibrated" in card_of(own_run, tmp_path, calibration=None, temperature=1.0)


def test_weights_that_export_py_wrote_are_calibrated_and_of_unknown_origin(exported, tmp_path):
    weights = exported("safetensors")
    page = card_of(weights, tmp_path)
    assert f"calibrated: logits are divided by {load_classifier(find_checkpoint('')).temperature:.3f}" in page
    assert "weights that aren't known here, or from scratch" in page


def test_its_code_runs_without_thaw(exported, trained, tmp_path):
    checkpoint = find_checkpoint("")
    model = exported("fp32")
    for name in (model.name, f"{model.name}.check.json"):
        shutil.copy(model.with_name(name), tmp_path)
    page = card_of(checkpoint, tmp_path)
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    transparent = Image.fromarray(np.full((50, 70, 4), (60, 60, 60, 0), np.uint8))  # dark, if that is what counted
    transparent.save(tmp_path / "image.jpg", "PNG")
    result = subprocess.run(
        [sys.executable, "-I", "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True, timeout=60
    )
    name, probability = result.stdout.split()
    expected = load_classifier(checkpoint, "cpu", precision="fp32").predict(str(tmp_path / "image.jpg"))[0]
    assert name == expected.label == "light"
    assert float(probability) == pytest.approx(expected.probability, abs=1e-3)
    assert (tmp_path / CARD).is_file()
