"""Comparison of classifiers: worked examples, error rate under the null hypothesis, and two real checkpoints."""

import csv
import json
import shutil

import numpy as np
import pytest
import torch

import eval as evaluation
from utils.evaluation.compare import (
    compare,
    difference_interval,
    flipped_rows,
    format_comparison,
    format_flipped,
    mcnemar_p_value,
)
from utils.evaluation.eval_lists import Overlap
from utils.metrics.scores import Scores
from utils.runs.checkpoint import find_checkpoint, load_checkpoint, save_checkpoint

UNSEEN = Overlap(images=40, trained_on=0, validated_on=0, known=True)
BOTH_UNSEEN = (UNSEEN, UNSEEN)


def scores(predicted: list[int], class_ids: list[int]) -> Scores:
    return Scores.from_logits(3 * torch.eye(3)[predicted] + torch.rand(len(predicted), 3) / 9, torch.tensor(class_ids))


def test_mcnemar_by_hand():
    assert mcnemar_p_value(0, 0) == 1
    assert mcnemar_p_value(3, 3) == 1
    assert mcnemar_p_value(0, 5) == pytest.approx(2 / 32)
    assert mcnemar_p_value(1, 5) == mcnemar_p_value(5, 1) == pytest.approx(2 * 7 / 64)


def test_published_example():
    """Agresti, Categorical Data Analysis, table 10.1: of 1,600 people 944, then 880 approved; 150 and 86 changed.
    McNemar's z² is 17.36, and the Wald interval of the difference is -0.059 to -0.021."""
    assert difference_interval(150, 86, 1600) == pytest.approx((-0.059, -0.021), abs=5e-4)
    assert 1e-5 < mcnemar_p_value(150, 86) < 6e-5  # 3.1e-5 by the normal approximation


def test_interval_has_width_without_any_difference():
    low, high = difference_interval(0, 0, 10)
    assert low == -high and high > 0.1


def test_significance_level_and_coverage_under_the_null_hypothesis():
    generator = np.random.default_rng(0)
    n, trials = 120, 2000
    cells = generator.multinomial(n, [0.7, 0.08, 0.08, 0.14], size=trials)
    significant = np.mean([mcnemar_p_value(a, b) < 0.05 for _, a, b, _ in cells])
    covered = np.mean([low <= 0 <= high for low, high in (difference_interval(a, b, n) for _, a, b, _ in cells)])
    assert significant < 0.06
    assert covered == pytest.approx(0.95, abs=0.015)


def test_counts_and_flipped_images_by_hand():
    truth = [0, 0, 1, 1, 2, 2, 0, 1]
    a = scores([0, 0, 1, 2, 2, 0, 1, 0], truth)
    b = scores([0, 1, 1, 1, 2, 2, 2, 1], truth)
    comparison = compare(a, b, BOTH_UNSEEN)
    counts = [comparison[key] for key in ("only_a_right", "only_b_right", "both_right", "both_wrong")]
    assert counts == [1, 3, 3, 1]
    assert comparison["difference"] == pytest.approx(2 / 8)
    assert "the difference is not significant" in format_comparison(comparison)
    rows = flipped_rows(a, b, [f"{i}.png" for i in range(8)], ["x", "y", "z"])
    assert {(row[0], row[2], row[3], row[5]) for row in rows[1:]} == {
        ("1.png", "A", "x", "y"),
        ("3.png", "B", "z", "y"),
        ("5.png", "B", "x", "z"),
        ("7.png", "B", "x", "y"),
    }
    assert "1.png: x, not y" in format_flipped(rows)
    assert "3.png: y, not z" in format_flipped(rows)


def test_significant_difference_is_reported():
    truth = [0] * 40
    half, all_correct = scores([1] * 20 + [0] * 20, truth), scores([0] * 40, truth)
    assert "B is significantly better" in format_comparison(compare(half, all_correct, BOTH_UNSEEN))
    assert "A is significantly better" in format_comparison(compare(all_correct, half, BOTH_UNSEEN))


def test_no_conclusion_if_the_better_one_has_seen_more_images():
    truth = [0] * 40
    a, b = scores([1] * 20 + [0] * 20, truth), scores([0] * 40, truth)
    for seen, note in (
        (Overlap(40, 40, 0, known=True), "40 of the 40 images were trained on"),
        (Overlap(40, 0, 40, known=True), "40 of the 40 images are in the validation list"),
        (Overlap(40, 0, 0, known=False), "It is unknown whether these images were trained on"),
    ):
        text = format_comparison(compare(a, b, (UNSEEN, seen)))
        assert "B is significantly better" not in text
        assert "B is more accurate, but has, or may have, seen more of these images" in text
        assert f"warning: B: {note}" in text
        assert "B is significantly better" in format_comparison(compare(a, b, (seen, seen)))
        assert "B is significantly better" in format_comparison(
            compare(a, b, (seen, UNSEEN))
        )  # although A has seen more


def test_two_checkpoints_on_the_same_images(trained, tmp_path, capsys):
    """The second checkpoint has the head's sign flipped; later also its classes renamed and in another order."""
    best = find_checkpoint("")
    content = load_checkpoint(best)
    weights = dict(content["weights"])
    for name in ("head.weight", "head.bias"):
        weights[name] = -weights[name]
    content = {key: value for key, value in content.items() if key != "format_version"}
    save_checkpoint(tmp_path / "flipped.pth", content | {"weights": weights})
    evaluation.main(compare=(str(best), str(tmp_path / "flipped.pth")), out=str(tmp_path))
    comparison = json.loads((tmp_path / "comparison.json").read_text())
    assert comparison["top1"][0] == pytest.approx(1 - comparison["top1"][1])
    assert comparison["a"] == str(best)
    printed = capsys.readouterr().out
    assert "A is significantly better" in printed
    assert "warning: B: It is unknown" in printed  # its lists are not beside it
    assert "warning: A" not in printed
    rows = list(csv.DictReader((tmp_path / "flipped.csv").open()))
    assert len(rows) == comparison["only_a_right"] + comparison["only_b_right"] == comparison["images"]
    assert all(row["prediction_a"] != row["prediction_b"] for row in rows)

    renamed = content | {"class_names": ["light", "dark"]}
    save_checkpoint(tmp_path / "renamed.pth", renamed | {"weights": weights})
    evaluation.main(compare=(str(best), str(tmp_path / "renamed.pth")), out=str(tmp_path))
    assert json.loads((tmp_path / "comparison.json").read_text())["both_right"] == comparison["only_a_right"]

    save_checkpoint(tmp_path / "other.pth", renamed | {"class_names": ["light", "red"]})
    with pytest.raises(ValueError, match="only in the first: dark; only in the second: red"):
        evaluation.main(compare=(str(best), str(tmp_path / "other.pth")), out=str(tmp_path))


def test_identical_checkpoints_do_not_differ(trained, tmp_path, capsys):
    best = find_checkpoint("")
    shutil.copy(best, tmp_path / "copy.pth")
    evaluation.main(compare=(str(best), str(tmp_path / "copy.pth")), out=str(tmp_path))
    assert "B - A: +0.00 points" in capsys.readouterr().out
