"""The network in the box: what ships, what it names before any training, and that it is what its card says."""

import json
import tarfile
from pathlib import Path

import pytest
import torch

import predict
from nets.weights.pretrained import BUNDLED_FOLDER, BUNDLED_WEIGHTS, find_pretrained
from utils.config.train_config import TrainConfig
from utils.inference.classifier import load_classifier
from utils.modeling.build import build_network

IMAGES = sorted((BUNDLED_FOLDER.parent / "img").glob("*.jpg"))
ON_THE_CARD = 0.837  # of these 1,000; 84.2 % of all 10,000
NAMES = {"aeroplane": "airplane", "car": "automobile", "cat": "cat", "ship": "ship"}


def test_it_is_small_and_says_what_it_is():
    assert BUNDLED_WEIGHTS.stat().st_size < 11e6
    card = json.loads(BUNDLED_WEIGHTS.with_suffix(".json").read_text())
    assert (card["model"]["name"], card["provenance"]["precision"]) == ("vit_xs_4", "fp16")
    told = BUNDLED_WEIGHTS.with_suffix(".md").read_text()
    for heading in ("## What it learned from", "## How it was made", "## How good it is", "## What it can't do"):
        assert heading in told


def test_it_names_images_before_any_training(here, capsys):
    assert {path.stem for path in IMAGES} == NAMES.keys()
    assert predict.main(tuple(map(str, IMAGES)), json_lines=True) == 0
    answers = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert {Path(answer["path"]).stem: answer["label"] for answer in answers} == NAMES


def test_a_run_starts_from_it(here, capsys):
    assert find_pretrained("vit_xs_4").path == BUNDLED_WEIGHTS
    config = TrainConfig(backbone="vit_xs_4", input_shape=(32, 32), pretrained=True)
    resolved, model, origin = build_network(config, [str(i) for i in range(10)])
    assert "its head of 10 other classes is excluded" in capsys.readouterr().out
    assert (resolved.eval_crop, Path(origin["file"])) == (1.0, BUNDLED_WEIGHTS)
    weights = load_classifier(BUNDLED_WEIGHTS, "cpu", precision="fp32").network.model.state_dict()
    assert torch.equal(model.state_dict()["blocks.5.mlp.fc1.weight"], weights["blocks.5.mlp.fc1.weight"])


def test_it_is_as_good_as_its_card_says(shared, here):
    """On the first 100 test images of each class, which had no part in its training."""
    classifier = load_classifier(BUNDLED_WEIGHTS)
    taken: dict[str, list[str]] = {name: [] for name in classifier.class_names}
    with tarfile.open(shared / "data/cifar10.tar") as archive:
        for member in archive:
            split, *_, name, file = ("", *Path(member.name).parts)[-3:] if member.isfile() else ("", "", "")
            if split == "test" and len(taken[name]) < 100:
                taken[name].append(file)
                Path(name).mkdir(exist_ok=True)
                Path(name, file).write_bytes(archive.extractfile(member).read())
    paths = [str(Path(name, file)) for name, files in taken.items() for file in files]
    right = sum(Path(answer.path).parent.name == answer.label for answer in classifier.predict(paths, top_k=1))
    assert len(paths) == 1000
    assert right / 1000 == pytest.approx(ON_THE_CARD, abs=0.03)
