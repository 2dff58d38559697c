"""utils/training/backbone_measurement.py against scikit-learn's functions, single images, and times worked by hand."""

import time

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from sklearn.model_selection import StratifiedKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from nets.factory import build_meta_model, build_model
from tests.conftest import TINY, settings, write_image
from utils.config.train_config import StageConfig
from utils.data.image_list import list_in_memory
from utils.training.backbone_measurement import (
    INVERSE_PENALTIES,
    Features,
    TooSlow,
    compute_features,
    cross_validate,
    estimate_seconds,
)
from utils.training.stages import plan_stages


@pytest.mark.parametrize(("classes", "noise"), [(2, 5.0), (5, 3.0)])
def test_cross_validation_matches_scikit_learn(classes, noise):
    generator = np.random.default_rng(0)
    ids = np.arange(90) % classes * 3  # with gaps
    x = generator.normal(size=(3 * classes, 12))[ids] + noise * generator.normal(size=(90, 12))
    x = 7 + x * np.logspace(-1, 1, 12)
    splitter = StratifiedKFold(5, shuffle=True, random_state=4)
    found = {}
    for c in INVERSE_PENALTIES:
        pipeline = make_pipeline(StandardScaler(), LogisticRegression(C=c, max_iter=1000))
        found[c] = cross_val_predict(pipeline, x, ids, cv=splitter, method="predict_proba")
    best = min(found, key=lambda c: log_loss(ids, found[c]))
    assert INVERSE_PENALTIES[0] < best < INVERSE_PENALTIES[-1]
    expected = np.unique(ids)[found[best].argmax(axis=1)] == ids
    assert 1 / classes < expected.mean() < 0.6
    assert cross_validate(x, ids, seed=4).tolist() == expected.tolist()


def test_labels_at_random_are_predicted_by_chance():
    """Although the regression fits all of them: there are more features than images."""
    generator = np.random.default_rng(0)
    hits = cross_validate(generator.normal(size=(300, 400)), generator.integers(0, 4, 300), seed=0)
    assert hits.mean() == pytest.approx(1 / 4, abs=0.1)


@pytest.mark.filterwarnings("error")
def test_classes_of_two_images():
    """Beside one that is large enough for five folds."""
    counts = [6, 2, 2]
    x = np.repeat(10 * np.eye(3), counts, axis=0)
    assert cross_validate(x, np.repeat([0, 4, 7], counts), seed=0).all()


def make_list(folder, count=5):
    return list_in_memory((i % 2, str(write_image(folder / f"{i}.png", 40 * i, seed=i))) for i in range(count))


def test_features_are_those_of_single_images(here, monkeypatch):
    monkeypatch.setattr("utils.training.backbone_measurement.MAX_BATCH", 2)
    config = settings(**TINY, image_mean=(0.5, 0.5, 0.5), image_std=(0.25, 0.25, 0.25), eval_crop=1.0)
    torch.manual_seed(0)
    model = build_model("vit_of_the_tests", 2, (8, 8)).eval()
    images = make_list(here)
    for i in range(5):
        level = np.full((8, 8, 3), 50 * i, np.uint8)
        Image.fromarray(level).save(f"{i}.png")
    started = time.monotonic()
    found = compute_features(model, config, images, torch.device("cpu"), deadline=started + 60)
    elapsed = time.monotonic() - started
    pixels = torch.arange(5).view(5, 1, 1, 1).expand(5, 3, 8, 8) * 50 / 255
    with torch.inference_mode():
        expected = model.forward_embedding((pixels - 0.5) / 0.25)
    np.testing.assert_allclose(found.values, expected, atol=1e-4)
    assert 0 < found.forward_seconds <= found.seconds <= elapsed / 5


def test_unreadable_images_are_replaced(here):
    images = make_list(here)
    (here / "3.png").write_bytes(b"damaged")
    model = build_model("vit_of_the_tests", 2, (8, 8))
    features = compute_features(model, settings(**TINY), images, torch.device("cpu"), time.monotonic() + 60).values
    np.testing.assert_array_equal(features[3], features[1])  # the other one of the class
    assert not np.array_equal(features[2], features[0])


def test_features_that_take_too_long(here, monkeypatch):
    """Known after the first batch, which takes a fifth of the time that there is."""
    monkeypatch.setattr("utils.training.backbone_measurement.MAX_BATCH", 1)
    now, calls = 1000.0, []
    monkeypatch.setattr("utils.training.backbone_measurement.time.monotonic", lambda: now + 10 * len(calls))
    model = build_model("vit_of_the_tests", 2, (8, 8)).eval()
    forward = model.forward_embedding
    monkeypatch.setattr(model, "forward_embedding", lambda x: calls.append(1) or forward(x))
    images = make_list(here)
    with pytest.raises(TooSlow):  # the first call, with empty images, isn't part of the pass, but takes its 10 s
        compute_features(model, settings(**TINY), images, torch.device("cpu"), deadline=now + 59)
    assert len(calls) == 2
    calls.clear()
    assert compute_features(model, settings(**TINY), images, torch.device("cpu"), deadline=now + 60).seconds == 10


FEATURES = Features(np.empty(0), seconds=0.5, forward_seconds=0.4)
STAGES = {
    # 3 epochs: 100 training images at 3 x 0.4 s, 20 validation images at 0.5 s
    "thawed": (StageConfig(3, "nothing"), 3 * (100 * 1.2 + 20 * 0.5)),
    # loading limits the training of the head
    "frozen": (StageConfig(3, "all"), 3 * (100 + 20) * 0.5),
    # two views, then 10 epochs that take no time
    "cached": (StageConfig(10, "all"), (2 * 100 + 20) * 0.5),
    "half of the side": (StageConfig(3, "nothing", input_shape=(4, 4)), 3 * (100 * 1.2 + 20 * 0.5) / 4),
}


@pytest.mark.parametrize("name", STAGES)
@pytest.mark.parametrize("head_init", ["random", "probe"])
def test_estimated_time(name, head_init):
    stage, expected = STAGES[name]
    last = StageConfig(1, "nothing")
    config = settings(**TINY | {"head_init": head_init, "feature_views": 2, "cache_features": name == "cached"})
    network = build_meta_model("vit_of_the_tests", 2, (8, 8))

    def estimate(*stages):
        planned = plan_stages(settings(**config.as_dict() | {"stages": stages}), 100, transformer=True)
        return estimate_seconds(config, network, planned, (100, 20), FEATURES)

    probe = 120 * 0.5 if head_init == "probe" else 0
    assert estimate(last) == pytest.approx(probe + 130)
    assert estimate(stage, last) == pytest.approx(probe + expected + 130, rel=0.03)


def test_repeats_of_the_list_take_time():
    network, stages = build_meta_model("vit_of_the_tests", 2, (8, 8)), (StageConfig(1, "nothing"),)

    def estimate(repeats):
        config = settings(**TINY | {"head_init": "random", "stages": stages, "epoch_repeats": repeats})
        return estimate_seconds(config, network, plan_stages(config, 100, transformer=True), (100, 20), FEATURES)

    validation = 20 * FEATURES.seconds
    assert estimate(7) - validation == pytest.approx(7 * (estimate(1) - validation))
