"""The training loss, against torch's with soft labels, and mixed images, pixel by pixel."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from utils.training.loss import Batch, TrainingLoss

CLASSES = 4


def flat_images(count: int = CLASSES, size: tuple[int, int] = (20, 30)) -> tuple[Tensor, Tensor]:
    """Image i has the level 60 * i everywhere, and is of class i."""
    class_ids = torch.arange(count)
    pixels = (60 * class_ids).to(torch.uint8)[:, None, None, None].expand(-1, 3, *size)
    return pixels.contiguous(), class_ids


def soft_labels(loss: TrainingLoss, batch) -> Tensor:
    """The labels as probabilities (B, classes), before they are smoothed."""
    own, other = (F.one_hot(ids, CLASSES).float() for ids in (batch.class_ids, batch.others))
    return batch.share * own + (1 - batch.share) * other


@pytest.mark.parametrize(
    ("weights", "options"),
    [
        (None, {}),
        (None, {"label_smoothing": 0.1}),
        (None, {"label_smoothing": 0.1, "mixup": 0.4}),
        (torch.tensor([0.5, 1.0, 2.0, 0.5]), {}),
        (torch.tensor([0.5, 1.0, 2.0, 0.5]), {"mixup": 0.4}),
    ],
)
def test_equals_torchs_with_soft_labels(weights, options):
    loss = TrainingLoss(weights, **options)
    batch = loss.mix(*flat_images(), seed=3)
    logits = torch.randn(CLASSES, CLASSES, generator=torch.Generator().manual_seed(0))
    expected = F.cross_entropy(
        logits, soft_labels(loss, batch), weights, reduction="none", label_smoothing=loss.label_smoothing
    )
    torch.testing.assert_close(loss(logits, batch), expected)
    assert (batch.share == 1) == ("mixup" not in options)


@pytest.mark.parametrize("mixup", [0.0, 0.4])
def test_weights_are_of_images_where_labels_are_smoothed(mixup):
    """Each image's part of a mixed one counts by the weight of its own class, whatever its label is spread over."""
    weights = torch.tensor([0.5, 1.0, 2.0, 0.5])
    loss = TrainingLoss(weights, label_smoothing=0.1, mixup=mixup)
    batch = loss.mix(*flat_images(), seed=3)
    logits = torch.randn(CLASSES, CLASSES, generator=torch.Generator().manual_seed(0))
    own, other = (
        weights[ids] * F.cross_entropy(logits, F.one_hot(ids, CLASSES).float(), reduction="none", label_smoothing=0.1)
        for ids in (batch.class_ids, batch.others)
    )
    torch.testing.assert_close(loss(logits, batch), batch.share * own + (1 - batch.share) * other)
    assert (batch.share == 1) == (mixup == 0)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_balanced_weights_keep_what_a_image_shows(smoothing):
    """A hundred common images and one rare, which can be told apart: at the lowest loss each is named as it is."""
    loss = TrainingLoss(torch.tensor([0.505, 50.5]), smoothing)
    logits = torch.zeros(2, 2, requires_grad=True)  # of a common image, and of the rare one
    counts = torch.tensor([100.0, 1.0])
    batch = Batch(logits, torch.arange(2), torch.arange(2), 1.0)
    optimizer = torch.optim.LBFGS([logits], max_iter=100)

    def descend() -> Tensor:
        optimizer.zero_grad()
        mean = (counts * loss(logits, batch)).mean()
        mean.backward()
        return mean

    optimizer.step(descend)
    shown = logits.detach().softmax(dim=1).diagonal()
    assert (shown > 0.9).all() and (smoothing == 0 or torch.allclose(shown, torch.tensor(1 - smoothing / 2), atol=1e-3))


def test_mixup_blends_each_image_with_another_in_the_labels_parts():
    pixels, class_ids = flat_images()
    loss = TrainingLoss(mixup=1.0)
    shares = []
    for seed in range(300):
        batch = loss.mix(pixels, class_ids, seed)
        assert torch.equal(batch.class_ids, class_ids)
        assert not (batch.others == class_ids).any()
        expected = 60 * (batch.share * class_ids + (1 - batch.share) * batch.others)
        assert (batch.inputs.float() - expected.view(-1, 1, 1, 1)).abs().max() <= 0.5 + 1e-3
        assert torch.equal(batch.largest, class_ids if batch.share >= 0.5 else batch.others)
        shares.append(batch.share)
    # Beta(1, 1) is uniform: its quantiles are themselves.
    assert np.quantile(shares, [0.1, 0.5, 0.9]) == pytest.approx([0.1, 0.5, 0.9], abs=0.08)


def test_cutmix_labels_go_by_the_area_that_was_cut():
    pixels, class_ids = flat_images()
    loss = TrainingLoss(cutmix=1.0)
    edges = 0
    for seed in range(300):
        batch = loss.mix(pixels, class_ids, seed)
        stayed = (batch.inputs == pixels)[:, 0].float().mean(dim=(1, 2))
        assert stayed.tolist() == pytest.approx([batch.share] * CLASSES)
        cut = (batch.inputs != pixels)[0, 0]
        assert torch.equal(batch.inputs[0, :, cut].unique(), (60 * batch.others[:1]).to(torch.uint8)[: int(cut.any())])
        rows, columns = cut.any(1).nonzero().flatten(), cut.any(0).nonzero().flatten()
        assert cut.sum() == len(rows) * len(columns)  # a box
        if len(rows):
            assert len(rows) == rows[-1] - rows[0] + 1
            edges += int(rows[0] == 0 or rows[-1] == 19 or columns[0] == 0 or columns[-1] == 29)
    assert 30 < edges < 290


def test_both_take_turns_by_the_seed():
    pixels, class_ids = flat_images()
    loss = TrainingLoss(mixup=1.0, cutmix=1.0)
    cut = [len(loss.mix(pixels, class_ids, seed).inputs[1].unique()) == 2 for seed in range(200)]
    assert 60 < sum(cut) < 140
    first, again = (loss.mix(pixels, class_ids, 5) for _ in range(2))
    assert torch.equal(first.inputs, again.inputs)
    assert first.share == again.share


def test_features_and_plain_batches_stay_as_they_are():
    pixels, class_ids = flat_images()
    features = torch.randn(CLASSES, 5, 8)
    assert TrainingLoss(mixup=1.0, cutmix=1.0).mix(features, class_ids, 1).inputs is features
    assert TrainingLoss().mix(pixels, class_ids, 1).inputs is pixels


def test_parts_are_the_whole():
    batch = TrainingLoss(mixup=1.0).mix(*flat_images(), seed=1)
    parts = list(batch.split(3))
    assert torch.equal(torch.cat([part.inputs for part in parts]), batch.inputs)
    assert torch.equal(torch.cat([part.others for part in parts]), batch.others)
    assert {part.share for part in parts} == {batch.share}
