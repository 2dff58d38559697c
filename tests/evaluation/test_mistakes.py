"""Selection of images for the report, and image corruptions."""

import numpy as np
import pytest
import torch

from tests.conftest import write_image
from utils.data.image_list import list_in_memory
from utils.evaluation.corruptions import CORRUPTIONS, corrupt
from utils.evaluation.mistakes import (
    accuracy_by,
    confused_pairs,
    label_errors,
    least_certain,
    margins,
    nearest,
    read_sizes,
    worst_mistakes,
)
from utils.metrics.intervals import wilson_interval
from utils.metrics.scores import Scores

P = torch.tensor(
    [
        [0.90, 0.05, 0.05],  # 0 as 0
        [0.20, 0.70, 0.10],  # 0 as 1
        [0.01, 0.98, 0.01],  # 0 as 1, most confident
        [0.30, 0.34, 0.36],  # 1 as 2, smallest margin
        [0.10, 0.85, 0.05],  # 1 as 1
        [0.60, 0.00001, 0.39999],  # 1 as 0, highest loss
    ]
)
SCORES = Scores.from_logits(P.log(), torch.tensor([0, 0, 0, 1, 1, 1]))


def test_selection_by_hand():
    assert worst_mistakes(SCORES, 2) == [5, 2]
    assert worst_mistakes(SCORES, 9) == [5, 2, 1, 3]
    assert least_certain(SCORES, 1) == [3]
    assert margins(SCORES)[0] == pytest.approx(0.85)
    pairs = confused_pairs(SCORES)
    assert [(pair.truth, pair.predicted, pair.images) for pair in pairs] == [(0, 1, [2, 1]), (1, 0, [5]), (1, 2, [3])]


def test_no_mistakes():
    right = Scores.from_logits(3 * torch.eye(3), torch.arange(3))
    assert worst_mistakes(right, 5) == [] and confused_pairs(right) == []


def test_planted_label_errors_are_found():
    generator = torch.Generator().manual_seed(0)
    class_ids = torch.randint(4, (400,), generator=generator)
    logits = 3 * torch.eye(5)[class_ids] + torch.randn(400, 5, generator=generator)  # the fifth class has no images
    wrong = torch.randperm(400, generator=generator)[:20]
    labels = class_ids.clone()
    labels[wrong] = (labels[wrong] + 1) % 4
    indices = label_errors(Scores.from_logits(logits, labels))
    assert len(set(indices) & set(wrong.tolist())) >= 15
    assert len(indices) <= 40
    assert set(indices[:10]) <= set(wrong.tolist())
    assert label_errors(Scores.from_logits(logits[:5], torch.zeros(5, dtype=torch.int64))) == []


def test_nearest_by_cosine_similarity():
    assert nearest(torch.tensor([[1.0, 0], [0, 5]]), torch.tensor([[0.0, 1], [9, 2], [-1, 0]])) == [1, 0]


def test_slices_by_hand():
    values = np.array([1.0, 2, 3, 4, 5, 6, 7, 8, np.nan])
    correct = np.array([1, 1, 0, 0, 1, 0, 1, 1, 1], bool)
    slices = accuracy_by(values, correct)
    assert [(part.low, part.high, part.count, part.accuracy) for part in slices] == [
        (1, 3, 3, 2 / 3),
        (4, 5, 2, 0.5),
        (6, 7, 2, 0.5),
        (8, 8, 1, 1),
    ]
    assert slices[0].interval == wilson_interval(2, 3)
    assert sum(part.count for part in accuracy_by(np.array([1.0] * 5 + [2.0]), np.ones(6, bool))) == 6
    assert len(accuracy_by(np.ones(6), np.ones(6, bool))) == 1
    assert accuracy_by(np.full(3, np.nan), np.ones(3, bool)) == []


def test_sizes_of_unreadable_images_are_nan(here):
    write_image(here / "a.png", size=(30, 20))
    (here / "b.png").write_text("no image")
    sizes = read_sizes(list_in_memory([(0, "a.png"), (0, "b.png")]), 10**6)
    assert sizes[0].tolist() == [30, 20] and np.isnan(sizes[1]).all()


def smooth() -> torch.Tensor:
    """Two images (2, 3, 48, 64) with a gradient and a bright square, without noise."""
    rows = torch.linspace(60, 180, 48)[:, None].expand(48, 64)
    image = rows.clone()
    image[16:32, 24:40] = 230
    return image.round().to(torch.uint8).expand(2, 3, 48, 64).clone()


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_corruption_is_mild_and_reproducible(name):
    pixels = smooth()
    changed = corrupt(pixels, CORRUPTIONS[name], seed=1)
    assert changed.shape == pixels.shape and changed.dtype == torch.uint8
    assert torch.equal(changed, corrupt(pixels, CORRUPTIONS[name], seed=1))
    difference = (changed.float() - pixels.float()).abs().mean()
    assert 0.2 < difference < 45
    both = torch.stack([pixels.float().flatten(), changed.float().flatten()])
    assert torch.corrcoef(both)[0, 1] > 0.8


def test_effect_of_each_corruption():
    pixels = smooth()
    level = {name: corrupt(pixels, CORRUPTIONS[name], 0).float().mean().item() for name in ("darker", "brighter")}
    assert level["darker"] == pytest.approx(0.75 * pixels.float().mean().item(), rel=0.01)
    assert level["brighter"] > pixels.float().mean() + 20
    noisy = corrupt(pixels, CORRUPTIONS["noise"], 0).float() - pixels.float()
    assert noisy.std().item() == pytest.approx(0.08 * 255, rel=0.1)

    def edges(image: torch.Tensor) -> torch.Tensor:
        return image.float().diff(dim=-1).abs().amax()

    assert edges(corrupt(pixels, CORRUPTIONS["blur"], 0)) < edges(pixels)
    rotated = corrupt(pixels, CORRUPTIONS["rotated by 10°"], 0)[0, 0].float()
    assert rotated[0, 0] != rotated[0, -1]  # rows were constant before
    assert pixels[0, 0, 0, 0] == pixels[0, 0, 0, -1]
