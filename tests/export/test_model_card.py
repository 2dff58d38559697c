"""The model card written by export.py."""

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
from nets.weights.digest import digest_file
from utils.export.formats import describe_export
from utils.export.model_card import CARD, check_card, escape, write_model_card
from utils.inference.classifier import load_classifier
from utils.runs.checkpoint import find_checkpoint

NAMES = ["a|b", "two\nlines", "<script>alert(1)</script>", "\x1b[31mred", "\udcff", "猫", "`x`", "[a](b)", "{{ 1 }}"]


@pytest.fixture
def own_run(trained, tmp_path):
    """A writable copy of the trained run, without output of eval.py and export.py from other tests."""
    run = tmp_path / "run"
    shutil.copytree(find_checkpoint("").parent, run, ignore=shutil.ignore_patterns("metrics*", "export"))
    return find_checkpoint(str(run))


def card_of(checkpoint, folder, **changes) -> str:
    classifier = dataclasses.replace(load_classifier(checkpoint, "cpu", precision="fp32"), **changes)
    facts = describe_export(classifier, checkpoint, "fp32")
    return write_model_card(folder, checkpoint, classifier, facts).read_text(encoding="utf-8")


def test_counts_metrics_and_hashes(own_run, tmp_path, capsys):
    folder = tmp_path / "out"
    folder.mkdir()
    page = card_of(own_run, folder)
    assert "Not evaluated" in page
    evaluation.main(model_path=str(own_run), data="datasets/test", corrupted=0)
    (folder / "model.onnx").write_bytes(b"exported")
    digest = digest_file(own_run)
    report = {"checkpoint_sha256": digest, "sha256": digest_file(folder / "model.onnx")}
    (folder / "a`<script>.onnx").write_bytes(b"exported")  # not a name that export.py uses
    for name in ("model.onnx", "gone.pt2", "a`<script>.onnx"):
        (folder / f"{name}.check.json").write_text(json.dumps(report))
    page = card_of(own_run, folder)
    assert "| dark | 22 | 2 |" in page
    assert "| light | 14 | 2 |" in page
    metrics = json.loads((own_run.parent / "eval/datasets_test/metrics.json").read_text())
    low, high = metrics["intervals"]["top1"]
    assert f"| top-1 | {metrics['top1']:.3f} ({low:.3f} to {high:.3f}) |" in page
    assert digest in page
    assert f"| model.onnx | 0.00 MB | `{report['sha256']}` |" in page
    assert "gone" not in page
    assert "script" not in page
    assert "were trained on" not in page
    evaluation.main(model_path=str(own_run), data="datasets/train", corrupted=0)
    page = card_of(own_run, folder)
    assert "- **36 of the 40 images were trained on:" in page
    assert "- **4 of the 40 images are in the validation list," in page


@pytest.mark.parametrize(
    ("origin", "text"),
    [
        ({}, "(height, width), trained from scratch."),
        ({"file": "/home/me/w.pth"}, "fine-tuned from pretrained weights in a file, SHA-256 `abc`."),
        ({"file": "x", "repository": "a<b", "revision": "1"}, "weights: a&#60;b, revision 1, SHA-256 `abc`."),
        ({"file": "x", "url": "x|y"}, "weights: x&#124;y, SHA-256 `abc`."),
    ],
)
def test_origin_of_the_weights(own_run, tmp_path, origin, text):
    page = card_of(own_run, tmp_path, origin=origin | {"sha256": "abc"} if origin else {})
    assert text in page
    assert "/home" not in page


@pytest.mark.parametrize(
    ("license", "text"),
    [
        ("apache-2.0", "License of the pretrained weights: apache-2.0.\nImages are"),
        ("cc-by-nc-4.0", "cc-by-nc-4.0. **Warning: this license doesn&#39;t allow commercial use**.\nImages are"),
        ("", "License of the pretrained weights: unknown: ask its author.\nImages are"),
        ("<b>mit", "weights: bmit. **Warning: this license has terms of its own"),
    ],
)
def test_license_of_the_weights(own_run, tmp_path, license, text):
    origin = {"file": "x", "sha256": "abc"} | ({"license": license} if license else {})
    assert text in card_of(own_run, tmp_path, origin=origin)
    assert "License" not in card_of(own_run, tmp_path, origin={})


def test_files_and_metrics_of_another_checkpoint_are_excluded(own_run, tmp_path):
    (tmp_path / "model.onnx").write_bytes(b"exported")
    report = {"checkpoint_sha256": "another", "sha256": digest_file(tmp_path / "model.onnx")}
    (tmp_path / "model.onnx.check.json").write_text(json.dumps(report))
    own_run.with_name("metrics.json").write_text(json.dumps({"checkpoint_sha256": "another"}))
    page = card_of(own_run, tmp_path)
    assert "Not evaluated" in page
    assert report["sha256"] not in page


def test_malformed_reports_are_errors(own_run, tmp_path):
    own_run.with_name("metrics.json").write_text(json.dumps({"checkpoint_sha256": digest_file(own_run), "data": []}))
    with pytest.raises(ValueError, match=r"metrics\.json is malformed"):
        card_of(own_run, tmp_path)
    (tmp_path / "model.onnx.check.json").write_text("[]")
    with pytest.raises(ValueError, match=r"check\.json is malformed"):
        card_of(own_run, tmp_path)


def test_checkpoint_outside_a_run(own_run, tmp_path, monkeypatch):
    alone = tmp_path / "alone" / "model.pth"
    alone.parent.mkdir()
    shutil.copy(own_run, alone)
    assert "| dark | unknown | unknown |" in card_of(alone, tmp_path)
    shutil.copytree("datasets/test", tmp_path / "test")
    monkeypatch.chdir(tmp_path)
    evaluation.main(model_path=str(alone), data="test", corrupted=0)
    page = card_of(alone, tmp_path)
    assert "Not evaluated" not in page
    assert "It is unknown whether these images were trained on:" in page


def test_only_a_model_card_is_overwritten(own_run, tmp_path):
    card_of(own_run, tmp_path)
    check_card(tmp_path)
    (tmp_path / "README.md").write_text("# My project")
    with pytest.raises(ValueError, match=r"README\.md is not a model card and would be overwritten"):
        export.main(model_path=str(own_run), out=str(tmp_path), format="safetensors", card=True)
    assert not (tmp_path / "model.safetensors").exists()


def test_class_names_are_escaped(own_run, tmp_path):
    for name in ("train_list.txt", "val_list.txt"):
        own_run.with_name(name).unlink()
    page = card_of(own_run, tmp_path, class_names=NAMES)
    assert "<" not in page.replace("<this checkpoint>", "")
    assert "\x1b" not in page
    table = page.partition("| class | training")[2].splitlines()[2 : 2 + len(NAMES)]
    assert [len(re.findall(r"\|", line)) for line in table] == [4] * len(NAMES)
    assert re.fullmatch(r"[\w \-,./:()%&#;]+", "".join(map(escape, NAMES)))
    assert escape("a|b") == "a&#124;b"
    assert escape("2026-11-30, 97.5 %") == "2026-11-30, 97.5 %"
    for link in ("https://a.b", "www.a.b", "me@a.b", "[a](b)", "<a>", "a_b_"):
        assert escape(link) != link


@pytest.mark.parametrize("letterbox", [False, True])
def test_preprocessing_and_calibration(own_run, tmp_path, letterbox):
    classifier = load_classifier(own_run, "cpu")
    preprocessing = dataclasses.replace(classifier.preprocessing, letterbox_image=letterbox)
    page = card_of(own_run, tmp_path, preprocessing=preprocessing)
    assert ("gray bars" in page, "the borders are not seen" in page) == (letterbox, not letterbox)
    assert "trained from scratch" in page
    assert f"divided by {classifier.temperature:.3f}" in page
    assert "calibrated" in page
    assert "Probabilities are not calibrated" in card_of(own_run, tmp_path, calibration=None, temperature=1.0)


def test_exported_weights_are_calibrated_and_of_unknown_origin(exported, tmp_path):
    weights = exported("safetensors")
    page = card_of(weights, tmp_path)
    assert f"calibrated: logits are divided by {load_classifier(find_checkpoint('')).temperature:.3f}" in page
    assert "trained from unknown weights or from scratch" in page


@pytest.mark.slow
def test_code_example_runs_without_thaw(exported, trained, tmp_path):
    checkpoint = find_checkpoint("")
    model = exported("fp32")
    for name in (model.name, f"{model.name}.check.json"):
        shutil.copy(model.with_name(name), tmp_path)
    page = card_of(checkpoint, tmp_path)
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    transparent = np.full((50, 70, 4), (60, 60, 60, 0), np.uint8)  # dark without its transparency
    transparent[0, 0, 3] = 255
    Image.fromarray(transparent).save(tmp_path / "image.jpg", "PNG")
    result = subprocess.run(
        [sys.executable, "-I", "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True, timeout=60
    )
    name, probability = result.stdout.split()
    expected = load_classifier(checkpoint, "cpu", precision="fp32").predict(str(tmp_path / "image.jpg"))[0]
    assert name == expected.label == "light"
    assert float(probability) == pytest.approx(expected.probability, abs=1e-3)
    assert (tmp_path / CARD).is_file()
