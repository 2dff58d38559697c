"""utils/inference/rejection.py and temperature scaling against scipy, scikit-learn, and on OOD images."""

import copy
import dataclasses
import math
import shutil
from itertools import count
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.optimize import minimize_scalar
from sklearn.covariance import LedoitWolf

import train
from tests.conftest import TINY, settings, write_image, write_two_classes
from utils.annotation.annotate import annotate
from utils.annotation.demo_digits import write_demo
from utils.data.image_list import list_in_memory, read_list, sample_indices, select
from utils.inference.classifier import load_classifier
from utils.inference.fit_calibration import EMBEDDINGS, calibrate_checkpoint, read_embeddings
from utils.inference.outputs import Outputs, compute_outputs
from utils.inference.rejection import DISTANCE_QUANTILE, Calibration, fit_calibration
from utils.metrics.scores import Scores, expected_calibration_error
from utils.metrics.temperature import PRIOR_DEVIATION, calibrated_losses, fit_temperature
from utils.runs.checkpoint import BEST, LAST, load_checkpoint


def overconfident(n: int, factor: float = 3.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits `factor` times too large, and classes drawn from the correct probabilities."""
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(n, 5, generator=generator) * 1.5
    return logits * factor, logits.softmax(1).multinomial(1, generator=generator)[:, 0]


def fitted(n: int = 60, m: int = 90, width: int = 6) -> Calibration:
    """A calibration of random embeddings around three means."""
    generator = torch.Generator().manual_seed(0)
    means = 4 * torch.randn(3, width, generator=generator)
    class_ids, train_ids = torch.arange(n) % 3, torch.arange(m) % 3
    embeddings = means[class_ids] + torch.randn(n, width, generator=generator)
    train_embeddings = means[train_ids] + torch.randn(m, width, generator=generator)
    logits = -torch.cdist(embeddings, means) + torch.randn(n, 3, generator=generator)
    return fit_calibration(logits, embeddings, class_ids, train_embeddings, train_ids)


@pytest.mark.parametrize(("n", "deviation"), [(500, 1.0), (20, 1.0), (20, PRIOR_DEVIATION)])
def test_the_temperature_equals_scipys_optimum(n, deviation):
    logits, class_ids = overconfident(n)

    def loss(log_temperature):
        scaled = logits.double().numpy() / math.exp(log_temperature)
        log_norm = np.log(np.exp(scaled).sum(axis=1))
        return (log_norm - scaled[np.arange(n), class_ids]).sum() + (log_temperature / deviation) ** 2 / 2

    expected = math.exp(minimize_scalar(loss, bounds=(-3, 3), method="bounded", options={"xatol": 1e-9}).x)
    assert fit_temperature(logits, class_ids, deviation) == pytest.approx(expected, rel=1e-4)


def test_with_few_images_the_default_prior_lowers_the_loss_on_others():
    """Mean of 200 draws of 10 images, of logits that are too large by factors drawn around 1."""
    logits, class_ids = overconfident(3000, factor=1.0)
    generator = torch.Generator().manual_seed(3)
    losses = dict.fromkeys((1.0, PRIOR_DEVIATION), 0.0)
    for _ in range(200):
        rows = torch.randperm(3000, generator=generator)[:10]
        scaled = logits * torch.empty(()).log_normal_(mean=0, std=0.3, generator=generator)
        for deviation in losses:
            temperature = fit_temperature(scaled[rows], class_ids[rows], deviation)
            losses[deviation] += torch.nn.functional.cross_entropy(scaled / temperature, class_ids).item() / 200
    assert losses[PRIOR_DEVIATION] < losses[1.0] - 0.01


def test_without_evidence_the_temperature_is_1():
    """Equal logits say nothing about it."""
    assert fit_temperature(torch.zeros(50, 3), torch.arange(50) % 3) == 1


def test_the_prior_is_negligible_with_many_images():
    assert fit_temperature(*overconfident(20_000)) == pytest.approx(3.0, rel=0.03)


def test_the_prior_bounds_the_temperature_when_all_are_correct():
    temperature = fit_temperature(torch.eye(3) * 2, torch.arange(3))
    assert 0.2 < temperature < 1
    assert fit_temperature(torch.eye(3).repeat(2000, 1) * 2, torch.arange(3).repeat(2000)) < temperature


def test_random_logits_have_a_high_temperature():
    logits = torch.randn(400, 4, generator=torch.Generator().manual_seed(0)) * 10
    assert 10 < fit_temperature(logits, torch.arange(400) % 4) < 1e4


def test_the_calibrated_loss_does_not_depend_on_the_scale_of_logits():
    logits, class_ids = overconfident(2_000)
    found = calibrated_losses(logits, class_ids)
    temperature = fit_temperature(logits, class_ids, prior_deviation=1.0)
    losses = torch.nn.functional.cross_entropy(logits / temperature, class_ids, reduction="none")
    assert torch.allclose(found, losses, rtol=1e-6, atol=0)
    assert found.mean() < torch.nn.functional.cross_entropy(logits, class_ids)
    assert calibrated_losses(5 * logits, class_ids).mean().item() == pytest.approx(found.mean().item(), rel=2e-3)


def test_distances_are_angles_under_scikit_learns_shrunk_covariance():
    generator = torch.Generator().manual_seed(2)
    x, class_ids = torch.randn(50, 8, generator=generator) * torch.arange(1.0, 9.0), torch.arange(50) % 2
    calibration = fit_calibration(torch.randn(50, 2, generator=generator), x, class_ids, x, class_ids)
    means = np.stack([x[class_ids == k].double().numpy().mean(0) for k in (0, 1)])
    covariance = LedoitWolf(assume_centered=True).fit(x.double().numpy() - means[class_ids])
    deviations, directions = x.double().numpy() - means.mean(0), means - means.mean(0)
    inner = deviations @ covariance.precision_ @ directions.T
    lengths = [np.sqrt(np.einsum("nc,cd,nd->n", v, covariance.precision_, v)) for v in (deviations, directions)]
    angles = np.degrees(np.arccos(inner / np.outer(*lengths)))
    assert np.allclose(calibration.distance, angles.min(axis=1), atol=1e-2)


def test_fit_with_equal_embeddings_and_absent_classes():
    class_ids = torch.tensor([0, 0, 3, 3])
    x = torch.tensor([[1.0, 0], [1, 0], [0, 1], [0, 1]])
    calibration = fit_calibration(torch.zeros(4, 5), x, class_ids, x, class_ids)
    assert calibration.directions.shape == (2, 2)
    assert calibration.distance.isfinite().all()


def test_rejection_by_hand():
    probability = torch.tensor([0.95, 0.9, 0.9, 0.8, 0.7, 0.6, 0.99])
    correct = torch.tensor([True, True, False, True, True, False, False])
    distance = torch.tensor([1.0, 1, 1, 1, 1, 1, 9])  # the last is too far, so it is excluded
    calibration = Calibration(1.0, torch.zeros(2), torch.eye(2), torch.eye(2), probability, correct, distance)
    # sorted: 1/1, then both with 0.9 2/3, 3/4, 4/5, 4/6 correct
    for max_error, expected in ((0.0, 0.95), (0.19, 0.95), (0.2, 0.7), (0.3, 0.7), (0.34, 0.6)):
        assert calibration.choose_rejection(max_error).min_probability == pytest.approx(expected)
    rejection = calibration.choose_rejection(0.2)
    assert rejection.accepts(probability, distance).tolist() == [True] * 5 + [False] * 2
    assert "71.4% are accepted, 20.0% of them wrong; expect" in rejection.format_cost(calibration)
    assert rejection.reason(0.95, 1) == ""
    assert rejection.reason(0.65, 1) == "low probability: 65.0% is below 70.0%"
    assert rejection.reason(0.99, 9).startswith("unlike all classes: 9° from the nearest class; 95% of the")


def test_an_unreachable_error_rate_rejects_everything():
    calibration = Calibration(
        *(1.0, torch.zeros(2), torch.eye(2), torch.eye(2)),
        *(torch.tensor([0.9, 0.8]), torch.tensor([False, True]), torch.ones(2)),
    )
    rejection = calibration.choose_rejection(0.05)
    assert math.isinf(rejection.min_probability)
    assert rejection.reason(1.0, 1) == "low probability: 100.0% is below every threshold"
    assert "none of the 2 validation images is accepted" in rejection.format_cost(calibration)


def test_farthest_is_the_stated_quantile():
    calibration = fitted(n=1000)
    assert (calibration.distance > calibration.max_distance).float().mean() == pytest.approx(
        1 - DISTANCE_QUANTILE, abs=0.002
    )


def test_from_dict_restores_a_calibration_and_refuses_invalid_ones():
    calibration = fitted()
    again = Calibration.from_dict(copy.deepcopy(calibration.as_dict()))
    assert again.temperature == calibration.temperature
    assert torch.equal(again.distances(torch.ones(2, 6)), calibration.distances(torch.ones(2, 6)))
    assert Calibration.from_dict({}) is None
    assert again.tta_temperature is None  # of an earlier version
    assert Calibration.from_dict(calibration.as_dict() | {"tta_temperature": 2.0}).tta_temperature == 2
    for wrong in (
        {"temperature": 0.0},
        {"temperature": math.nan},
        {"temperature": None},
        {"whitening": torch.zeros(6, 5)},
        {"directions": torch.zeros(3, 5)},
        {"directions": torch.zeros(0, 6)},
        {"centre": torch.zeros(5)},
        {"distance": torch.zeros(3)},
        {"probability": torch.full((60,), math.nan)},
        {"correct": None},
        {"correct": torch.zeros(60)},
        {"distance": torch.zeros(60, dtype=torch.int64)},
        {"temperature": 1e-310},
        {"tta_temperature": 0.0},
        {"tta_temperature": math.nan},
        {"tta_temperature": torch.ones(1)},
    ):
        with pytest.raises(TypeError, match="calibration"):
            Calibration.from_dict(calibration.as_dict() | wrong)


def test_with_a_temperature_of_its_own_tta_is_calibrated_on_held_out_images(trained, tmp_path, monkeypatch):
    """Views are independent noise around logits that are calibrated when averaged; the center alone is overconfident,
    so its temperature is far too high for the average."""
    generator = torch.Generator().manual_seed(0)
    n, num_views = 1000, 10
    averaged = 2 * torch.randn(2 * n, 4, generator=generator)
    class_ids = averaged.softmax(1).multinomial(1, generator=generator)[:, 0]
    center = averaged + 3 * torch.randn(2 * n, 4, generator=generator) * (1 - 1 / num_views) ** 0.5
    embeddings = torch.randn(n, 6, generator=generator)

    def outputs(logits: torch.Tensor) -> Outputs:
        return Outputs(logits[:n], embeddings, class_ids[:n], torch.zeros(n), torch.arange(n))

    computed = iter([outputs(center), outputs(center), outputs(averaged)])  # of training, validation, and with TTA
    monkeypatch.setattr("utils.inference.fit_calibration.compute_outputs", lambda *_, **__: next(computed))
    monkeypatch.setattr("utils.inference.fit_calibration.MAX_TTA_IMAGES", n)
    shutil.copy(next(trained.glob(f"logs/*/{BEST}")), tmp_path / BEST)
    images = list_in_memory((int(k), "-") for k in class_ids[:n])
    fitted = Calibration.from_dict(calibrate_checkpoint(tmp_path / BEST, images, images, settings(**TINY)).calibration)
    own, single = (
        Scores.from_logits(averaged[n:], class_ids[n:], temperature)
        for temperature in (fitted.tta_temperature, fitted.temperature)
    )
    assert fitted.tta_temperature == pytest.approx(1, abs=0.15) and fitted.temperature > 1.5
    assert own.losses.mean() < single.losses.mean() - 0.02
    assert expected_calibration_error(own) < 0.05 < expected_calibration_error(single)


def test_with_one_view_tta_has_the_temperature_of_the_image(two_classes):
    train.main(settings(**TINY | {"letterbox_image": True, "horizontal_flip": 0.0}))
    calibration = load_classifier("", "cpu").calibration
    assert calibration.tta_temperature == pytest.approx(calibration.temperature, rel=1e-4)


def test_a_finished_run_is_calibrated(trained):
    (run,) = trained.glob("logs/*")
    best, last = (load_checkpoint(run / name) for name in (BEST, LAST))
    assert last["finished"]
    assert bool(last["calibration"]) == (best["step"] == last["step"])
    classifier = load_classifier(run)
    images = read_list("cls_val.txt", 2)
    outputs = compute_outputs(classifier, images, num_workers=0)
    calibration = classifier.calibration
    assert calibration.temperature == pytest.approx(fit_temperature(outputs.logits, outputs.class_ids), rel=1e-4)
    tta = compute_outputs(classifier, images, num_workers=0, tta=True)
    assert calibration.tta_temperature == pytest.approx(fit_temperature(tta.logits, tta.class_ids), rel=1e-4)
    torch.testing.assert_close(calibration.distance, calibration.distances(outputs.embeddings), rtol=1e-3, atol=1e-3)
    raw = load_classifier(run, "cpu", raw=True)
    pixels = raw.load(images.path(0))[None]
    assert torch.allclose(raw.probabilities(pixels), outputs.logits[:1].softmax(1), atol=1e-6)
    tempered = (outputs.logits[:1] / calibration.temperature).softmax(1)
    assert torch.allclose(classifier.probabilities(pixels), tempered, atol=1e-6)


def test_the_last_checkpoint_has_no_calibration_of_the_best(here, monkeypatch):
    """The last checkpoint is calibrated only if it is the best."""
    write_two_classes(here / "datasets")
    annotate("datasets")
    losses = count(0.5, 0.1)
    start = [torch.ones(4)]
    calibrated = lambda logits, targets: start.pop() if start else torch.full((4,), next(losses))  # noqa: E731
    monkeypatch.setattr("utils.training.trainer.calibrated_losses", calibrated)
    train.main(settings(**TINY))
    (run,) = here.glob("logs/*")
    best, last = (load_checkpoint(run / name) for name in (BEST, LAST))
    assert best["step"] < last["step"]
    assert best["calibration"] and not last["calibration"]
    assert last["finished"] and best["finished"]
    assert last["optimizer"] and not best["optimizer"]


def test_calibration_skips_unreadable_images(two_classes, capsys):
    """All validation images of a class and a training image become unreadable after training."""
    train.main(settings(**TINY | {"unfreeze_epoch": 1}))
    (run,) = Path("logs").iterdir()
    train_images, val_images = read_list("cls_train.txt", 2), read_list("cls_val.txt", 2)
    before = load_checkpoint(run / BEST)["calibration"]
    broken = [val_images.path(i) for i in np.flatnonzero(val_images.class_ids == 0)] + [train_images.path(3)]
    for path in broken:
        Path(path).write_text("no image")
    after = calibrate_checkpoint(run / BEST, train_images, val_images, settings(**TINY)).calibration
    assert len(after["correct"]) == len(before["correct"]) - len(broken) + 1
    kept = read_embeddings(run / BEST, Calibration.from_dict(after), 2)
    assert len(kept.images) == len(train_images) - 1
    assert train_images.path(3) not in [kept.images.path(i) for i in range(len(kept.images))]
    for path in (*broken, *(val_images.path(i) for i in range(len(val_images)))):
        Path(path).write_text("no image")
    assert calibrate_checkpoint(run / BEST, train_images, val_images, settings(**TINY)) == ({}, ())


def test_draw_by_class_includes_rare_classes():
    class_ids = [0] * 900 + [1] * 90 + [2] * 5
    images = list_in_memory((k, f"{i}.png") for i, k in enumerate(class_ids))
    drawn = sample_indices(images, 60, seed=1, by_class=True)
    counts = np.bincount(images.class_ids[drawn])
    assert counts[2] == 5 and abs(counts[0] - counts[1]) <= 1 and counts.sum() == 60
    assert (np.diff(drawn) > 0).all()
    plain = sample_indices(images, 60, seed=1)
    assert np.bincount(images.class_ids[plain])[0] > 40
    assert sample_indices(images, 5000, seed=1).tolist() == list(range(995))
    some = select(images, drawn)
    assert [some.path(i) for i in range(60)] == [f"{i}.png" for i in drawn]


def test_embeddings_of_training_images_are_saved(trained, tmp_path, capsys):
    (run,) = trained.glob("logs/*")
    train_images = read_list("cls_train.txt", 2)
    calibration = load_classifier(run, "cpu").calibration
    kept = read_embeddings(run / BEST, calibration, 2)
    assert [kept.images.path(i) for i in range(len(train_images))] == [train_images.path(i) for i in range(36)]
    outputs = compute_outputs(load_classifier(run, "cpu"), train_images, num_workers=0)
    torch.testing.assert_close(kept.embeddings, outputs.embeddings, atol=2e-3, rtol=2e-3)
    assert read_embeddings(run / BEST, fitted(), 2) is None  # another calibration
    assert read_embeddings(run / BEST, None, 2) is None
    assert read_embeddings(tmp_path / BEST, calibration, 2) is None
    assert capsys.readouterr().out == ""
    assert read_embeddings(run / BEST, calibration, 1) is None  # a class id out of range
    assert "no training images are shown" in capsys.readouterr().out
    (tmp_path / EMBEDDINGS).write_bytes((run / EMBEDDINGS).read_bytes()[:1000])
    assert read_embeddings(tmp_path / BEST, calibration, 2) is None
    assert "no training images are shown" in capsys.readouterr().out


def test_an_unseen_class_is_rejected_far_more_often(here):
    """The unseen class has a brightness between those of the two trained classes."""
    for name, level in (("dark", 60), ("light", 190)):
        for i in range(120):
            write_image(here / "datasets" / "train" / name / f"{i:02d}.png", level, seed=i)
    train.main(settings(**TINY | {"unfreeze_epoch": 6}))
    classifier = load_classifier(next(here.glob("logs/*")), "cpu")
    rejection = classifier.calibration.choose_rejection(0.05)

    def rejected(level: int) -> float:
        paths = [write_image(here / f"{level}" / f"{i}.png", level, seed=1000 + i) for i in range(40)]
        images = list_in_memory((0, str(path)) for path in paths)
        outputs = compute_outputs(classifier, images, num_workers=0)
        probability = (outputs.logits / classifier.temperature).softmax(1).amax(1)
        distance = classifier.calibration.distances(outputs.embeddings)
        return 1 - rejection.accepts(probability, distance).float().mean().item()

    known = (rejected(60) + rejected(190)) / 2
    assert known < 0.25
    assert rejected(125) > 0.75


@pytest.mark.slow
def test_an_unseen_digit_is_rejected_far_more_often(here):
    write_demo(here / "datasets")
    for split in ("train", "test"):
        shutil.move(here / "datasets" / split / "4", here / f"four_{split}")
    scratch = {"pretrained": False, "input_shape": (16, 16), "freeze_epoch": 2, "unfreeze_epoch": 40, "train_crop": 0.7}
    train.main(dataclasses.replace(train.CONFIG, **scratch))
    classifier = load_classifier(next(here.glob("logs/*")), "cpu")
    rejection = classifier.calibration.choose_rejection(0.05)

    def rejected(paths: list[Path]) -> float:
        outputs = compute_outputs(classifier, list_in_memory((0, str(path)) for path in paths), num_workers=0)
        probability = (outputs.logits / classifier.temperature).softmax(1).amax(1)
        distance = classifier.calibration.distances(outputs.embeddings)
        return 1 - rejection.accepts(probability, distance).float().mean().item()

    known = rejected(sorted((here / "datasets" / "test").rglob("*.png")))
    unknown = rejected(sorted((here / "four_test").iterdir()))
    print(f"rejected: {known:.1%} of known digits, {unknown:.1%} of the unseen one")
    assert known < 0.12
    assert unknown > max(0.4, 4 * known)
