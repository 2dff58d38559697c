"""The head is fitted once more after training, and validation images that were trained on judge nothing."""

from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import train
from tests.conftest import TINY, settings
from tests.faults.harness import digest
from utils.data.image_list import read_list
from utils.evaluation.eval_lists import count_overlap
from utils.inference.classifier import load_classifier
from utils.inference.outputs import compute_outputs
from utils.runs import run as run_module
from utils.runs.checkpoint import BEST, LAST, load_checkpoint
from utils.runs.saved_settings import settings_to_continue
from utils.runs.setup import prepare
from utils.training import linear_probe

REFIT = TINY | {"refit_head": True, "unfreeze_epoch": 2, "precision": "fp32", "recipe": "none"}


def trained_run(**changes) -> Path:
    train.main(settings(**REFIT | changes))
    return max(Path("logs").iterdir())


def test_the_head_is_a_regression_on_training_and_validation_images(two_classes, here, capsys):
    run = trained_run()
    printed = capsys.readouterr().out
    assert "refit_head: regression on " in printed and "the new head is used" in printed
    penalty = float(printed.split("training images, C=")[1].split(":")[0])
    classifier = load_classifier(run / BEST, "cpu")
    lists = [read_list(f"cls_{split}.txt", 2) for split in ("train", "val")]
    outputs = [compute_outputs(classifier, images, num_workers=0) for images in lists]
    x = torch.cat([output.embeddings for output in outputs]).numpy()
    y = torch.cat([output.class_ids for output in outputs]).numpy()
    penalty = min(linear_probe.INVERSE_PENALTIES, key=lambda value: abs(np.log(value / penalty)))  # printed rounded
    peer = make_pipeline(StandardScaler(), LogisticRegression(C=penalty, max_iter=1000)).fit(x, y)
    logits = torch.cat([output.logits for output in outputs])
    np.testing.assert_allclose(logits.softmax(1), peer.predict_proba(x), atol=2e-3)


def test_a_worse_head_is_not_used(two_classes, here, monkeypatch, capsys):
    def wrong(*arrays):
        refit = refit_head(*arrays)
        probe = refit.probe._replace(weight=-refit.probe.weight, bias=-refit.probe.bias)
        return refit._replace(weight=0 * refit.weight, probe=probe)

    refit_head = linear_probe.refit_head

    alone = trained_run(refit_head=False, unfreeze_epoch=4)
    monkeypatch.setattr(linear_probe, "refit_head", wrong)
    (here / "cls_val.txt").write_text((here / "cls_val.txt").read_text() + (here / "cls_test.txt").read_text())
    run = trained_run(unfreeze_epoch=4)
    assert "the trained head is used, since the new one is worse" in capsys.readouterr().out
    heads = [load_checkpoint(folder / BEST)["weights"]["head.weight"] for folder in (alone, run)]
    assert torch.equal(*heads) and heads[0].any()
    best, last = (load_checkpoint(run / name) for name in (BEST, LAST))
    assert best["config"]["refit_head"] is False  # so validation images don't count as trained on
    assert last["calibration"]


def test_killed_while_finishing_it_is_not_fitted_twice(two_classes, here, monkeypatch):
    wanted = load_checkpoint(trained_run(name="whole") / BEST)
    amend = run_module.amend_checkpoint

    def die(path, changes, whole=False):
        if path.name == LAST:
            raise KeyboardInterrupt
        amend(path, changes, whole)

    with monkeypatch.context() as patch:
        patch.setattr(run_module, "amend_checkpoint", die)
        with pytest.raises(KeyboardInterrupt):
            trained_run(name="cut")
    run = trained_run(name="cut")
    found, last = load_checkpoint(run / BEST), load_checkpoint(run / LAST)
    assert digest([found["weights"], found["calibration"]]) == digest([wanted["weights"], wanted["calibration"]])
    assert last["finished"] and last["calibration"] == {}


def test_a_run_that_goes_on_gets_a_head_that_has_not_seen_the_validation_images(two_classes, here):
    run = trained_run()
    config = settings_to_continue(str(run))
    assert (config.head_init, config.epoch_repeats) == ("probe", 1)
    assert settings_to_continue(str(trained_run(refit_head=False))).head_init == "random"


def test_without_validation_images_of_the_training_classes_the_head_stays(two_classes, here, capsys):
    prepare(settings(**REFIT))  # writes the lists
    lines = (here / "cls_val.txt").read_text().splitlines(keepends=True)
    (here / "cls_val.txt").write_text("".join(line for line in lines if line.startswith("0")))
    train_lines = (here / "cls_train.txt").read_text().splitlines(keepends=True)
    (here / "cls_train.txt").write_text("".join(line for line in train_lines if line.startswith("1")))
    run = trained_run()
    assert "refit_head: not done, since it needs two classes" in capsys.readouterr().out
    assert load_checkpoint(run / BEST)["calibration"]


@pytest.mark.parametrize(("refit", "counts"), [(True, (4, 0)), (False, (0, 4))])
def test_validation_images_count_as_trained_on(two_classes, here, refit, counts):
    run = trained_run(refit_head=refit, unfreeze_epoch=1)
    images = read_list("cls_val.txt", 2)
    overlap = count_overlap(run / BEST, load_classifier(run / BEST, "cpu"), images)
    assert (overlap.trained_on, overlap.validated_on) == counts


def test_without_a_test_list_eval_warns(two_classes, here, command):
    for image in (here / "datasets" / "test").rglob("*.png"):
        image.unlink()
    run = trained_run(unfreeze_epoch=1)
    assert not (here / "cls_test.txt").exists()
    result = command("eval.py", str(run))
    assert result.returncode == 0, result.stderr
    assert "the head was fitted to the images of" in result.stdout
