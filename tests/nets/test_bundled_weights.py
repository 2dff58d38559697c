"""The bundled weights: size, model card, predictions, accuracy, and training from them."""

import json
import tarfile
from pathlib import Path

import pytest
import torch

import predict
from nets.weights.pretrained import BUNDLED_FOLDER, BUNDLED_WEIGHTS, find_pretrained
from tests.conftest import settings
from utils.inference.classifier import load_classifier
from utils.modeling.build import build_network

IMAGES = sorted((BUNDLED_FOLDER.parent / "img").glob("*.jpg"))
CARD_ACCURACY = 0.837  # on these 1,000 images; 0.842 on all 10,000
NAMES = {"aeroplane": "airplane", "car": "automobile", "cat": "cat", "ship": "ship"}


def test_size_and_model_card():
    assert BUNDLED_WEIGHTS.stat().st_size < 11e6
    card = json.loads(BUNDLED_WEIGHTS.with_suffix(".json").read_text())
    assert (card["model"]["name"], card["provenance"]["precision"]) == ("vit_xs_4", "fp16")
    text = BUNDLED_WEIGHTS.with_suffix(".md").read_text()
    for heading in ("## Training data", "## Training", "## Accuracy", "## Limits"):
        assert heading in text


def test_predict_example_images(here, capsys):
    assert {path.stem for path in IMAGES} == NAMES.keys()
    assert predict.main(tuple(map(str, IMAGES)), json_lines=True) == 0
    predictions = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert {Path(p["path"]).stem: p["label"] for p in predictions} == NAMES


def test_training_starts_from_the_bundled_weights(here, capsys):
    assert find_pretrained("vit_xs_4").path == BUNDLED_WEIGHTS
    config = settings(backbone="vit_xs_4", input_shape=(32, 32), pretrained=True)
    resolved, model, origin, _ = build_network(config, [str(i) for i in range(10)])
    assert "its head of 10 other classes isn't loaded" in capsys.readouterr().out
    assert (resolved.eval_crop, Path(origin["file"])) == (1.0, BUNDLED_WEIGHTS)
    weights = load_classifier(BUNDLED_WEIGHTS, "cpu", precision="fp32").network.model.state_dict()
    assert torch.equal(model.state_dict()["blocks.5.mlp.fc1.weight"], weights["blocks.5.mlp.fc1.weight"])


def test_accuracy_is_that_of_the_model_card(shared, here):
    """On the first 100 test images of each class."""
    classifier = load_classifier(BUNDLED_WEIGHTS)
    files_of: dict[str, list[str]] = {name: [] for name in classifier.class_names}
    with tarfile.open(shared / "data/cifar10.tar") as archive:
        for member in archive:
            split, *_, name, file = ("", *Path(member.name).parts)[-3:] if member.isfile() else ("", "", "")
            if split == "test" and len(files_of[name]) < 100:
                files_of[name].append(file)
                Path(name).mkdir(exist_ok=True)
                Path(name, file).write_bytes(archive.extractfile(member).read())
    paths = [str(Path(name, file)) for name, files in files_of.items() for file in files]
    correct = sum(Path(p.path).parent.name == p.label for p in classifier.predict(paths, top_k=1))
    assert len(paths) == 1000
    assert correct / 1000 == pytest.approx(CARD_ACCURACY, abs=0.03)
