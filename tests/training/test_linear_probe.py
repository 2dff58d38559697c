"""utils/training/linear_probe.py against scikit-learn's pipeline, and in a run."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import train
from tests.conftest import TINY, settings, write_back
from utils.data.preprocessing import Preprocessing
from utils.modeling.build import build_network
from utils.modeling.pixel_network import PixelNetwork
from utils.runs.checkpoint import LAST, load_checkpoint
from utils.training.datasets import load_data, make_datasets
from utils.training.feature_cache import FeatureCache
from utils.training.linear_probe import INVERSE_PENALTIES, fit_probe, init_head, refit_head


def make_features(class_ids, seed, views=1, noise=1.5):
    """Noisy features of each class, with different scales, (views * n, 12), and their class ids."""
    generator = np.random.default_rng(seed)
    centres = np.random.default_rng(99).normal(size=(5, 12))
    x = centres[class_ids] + noise * generator.normal(size=(views, len(class_ids), 12))
    x = 7 + x * np.logspace(-1, 1, 12)
    return np.concatenate(x).astype(np.float32), np.tile(class_ids, views)


@pytest.mark.parametrize("balanced", [False, True])
@pytest.mark.parametrize("num_classes", [2, 4])
def test_probe_matches_scikit_learn_with_the_best_penalty(num_classes, balanced):
    ids = np.minimum(np.arange(90) % (num_classes + 2), num_classes - 1)  # the last class is the largest
    val_ids = np.arange(80) % num_classes
    (x, y), (val_x, val_y) = make_features(ids, 1, views=2), make_features(val_ids, 2)
    probe = fit_probe(x, y, val_x, val_y, num_classes, balanced)

    losses = {}
    for c in INVERSE_PENALTIES:
        peer = LogisticRegression(C=c, max_iter=1000, class_weight="balanced" if balanced else None)
        pipeline = make_pipeline(StandardScaler(), peer).fit(x, y)
        losses[c] = log_loss(val_ids, pipeline.predict_proba(val_x))
        if c == probe.inverse_penalty:
            expected = pipeline.predict_proba(val_x)
    assert probe.inverse_penalty == min(losses, key=losses.get)
    assert INVERSE_PENALTIES[0] < probe.inverse_penalty < INVERSE_PENALTIES[-1]
    assert probe.val_loss == pytest.approx(min(losses.values()), rel=1e-3)
    own = (torch.from_numpy(val_x) @ probe.weight.T + probe.bias).softmax(1)
    np.testing.assert_allclose(own, expected, atol=2e-3)
    assert probe.val_top1 == pytest.approx((own.argmax(1).numpy() == val_ids).mean())


def test_class_without_images_is_least_likely():
    """Absent from training only, or from validation too."""
    ids = np.array([0, 1, 3] * 20)
    for val_ids in (ids, np.array([0, 1, 2, 3] * 10)):
        val_x, val_y = make_features(val_ids, 2)
        probe = fit_probe(*make_features(ids, 1), val_x, val_y, num_classes=5, balanced=False)
        logits = torch.from_numpy(val_x) @ probe.weight.T + probe.bias
        assert not probe.weight[[2, 4]].any()
        known = logits[:, [0, 1, 3]]
        assert (logits[:, [2, 4]] < known.median()).all()
        assert (known > logits[:, [2]]).float().mean() > 0.98
        assert probe.val_top1 > 0.5


@pytest.mark.parametrize("balanced", [False, True])
def test_refit_is_scikit_learns_regression_on_all_features(balanced):
    ids, val_ids = np.minimum(np.arange(60) % 5, 3), np.arange(13) % 4
    (x, y), (val_x, val_y) = make_features(ids, 1), make_features(val_ids, 2)
    refit = refit_head(x, y, val_x, val_y, num_classes=4, balanced=balanced)
    alone = fit_probe(x, y, val_x, val_y, 4, balanced)
    assert refit.probe.inverse_penalty == alone.inverse_penalty
    torch.testing.assert_close(refit.probe.predict(torch.from_numpy(val_x)), alone.predict(torch.from_numpy(val_x)))
    peer = LogisticRegression(C=alone.inverse_penalty, max_iter=1000, class_weight="balanced" if balanced else None)
    pipeline = make_pipeline(StandardScaler(), peer).fit(np.concatenate([x, val_x]), np.concatenate([y, val_y]))
    own = (torch.from_numpy(val_x) @ refit.weight.T + refit.bias).softmax(1)
    np.testing.assert_allclose(own, pipeline.predict_proba(val_x), atol=2e-3)


def test_the_head_that_judges_has_not_seen_the_validation_images():
    """With random labels, the head that was fitted to all images knows them; the one of the training images doesn't."""
    generator = np.random.default_rng(0)
    x, val_x = generator.normal(size=(2, 60, 200)).astype(np.float32)
    y, val_y = generator.integers(2, size=(2, 60))
    refit = refit_head(x, y, val_x, val_y, num_classes=2, balanced=False)
    seen = (torch.from_numpy(val_x) @ refit.weight.T + refit.bias).argmax(1).numpy()
    assert (seen == val_y).mean() > 0.9
    assert 0.3 < (refit.probe.predict(torch.from_numpy(val_x)).argmax(1).numpy() == val_y).mean() < 0.7


@pytest.mark.parametrize(("class_ids", "val_class_ids"), [([1, 1, 1], [0, 1]), ([0, 1, 1], [2, 2])])
def test_unusable_lists_are_an_error_before_computing(class_ids, val_class_ids):
    """One training class; no training class in the validation list."""
    train_set, val_set = (SimpleNamespace(class_ids=np.array(ids)) for ids in (class_ids, val_class_ids))
    with pytest.raises(ValueError, match=r"^head_init='probe'.*set head_init to random"):
        init_head(None, None, train_set, val_set, settings())


@pytest.mark.parametrize("changes", [{}, {"freeze_train": False}, {"freeze_blocks": "all", "precision": "bf16"}])
def test_run_starts_from_the_probe(two_classes, capsys, changes):
    """A resumed run doesn't fit it again."""
    config = settings(
        **TINY | {"head_init": "probe", "unfreeze_epoch": 2, "save_period": 1, "init_lr": 1e-6, "min_lr": 0.0} | changes
    )
    train.main(config)
    printed = capsys.readouterr().out
    assert "head_init: logistic regression, C=" in printed
    val_loss = float(printed.split("validation loss ")[1].split(",")[0])
    run = next(Path("logs").iterdir())
    history = load_checkpoint(run / LAST)["history"]
    assert history[0]["val_loss"] == pytest.approx(val_loss, abs=1e-3)  # of epoch 0
    assert history[1]["val_loss"] == pytest.approx(val_loss, abs=0.05)  # the learning rate is tiny
    assert history[0]["val_top1"] == history[1]["val_top1"] == 1.0
    write_back(run, epoch=1)
    train.main(settings(**config.as_dict() | {"resume": str(run), "input_shape": (8, 8)}))
    assert "logistic regression" not in capsys.readouterr().out


@pytest.mark.slow
def test_probe_reaches_the_published_accuracy(shared, here, capsys):
    """The README of the weights: 68.9 % on TrashNet's test images by logistic regression on the class token."""
    data = shared / "data" / "trashnet"
    names = sorted(path.name for path in (data / "train").iterdir())
    Path("classes.txt").write_text("\n".join(names))
    for split in ("train", "test"):
        images = ((i, path) for i, name in enumerate(names) for path in sorted((data / split / name).iterdir()))
        Path(f"{split}.txt").write_text("\n".join(f"{i};{path}" for i, path in images))
    lists = {"train_annotation_path": "train.txt", "val_annotation_path": "test.txt", "classes_path": "classes.txt"}
    config = settings(
        backbone="vit_s_14",
        model_path=str(next((shared / "models").glob("*.safetensors"))),
        activation="gelu",
        feature_views=1,
        num_workers=0,
        **lists,
    )
    data = load_data(config)
    config, model, *_ = build_network(config, names)
    network = PixelNetwork(model, Preprocessing.from_config(config), torch.device("cpu"))
    init_head(model, FeatureCache(network, config, torch.device("cpu"), "fp32"), *make_datasets(data, config), config)
    top1 = float(capsys.readouterr().out.rsplit("top-1 ")[-1].rstrip("%\n"))
    assert top1 == pytest.approx(68.9, abs=4)
