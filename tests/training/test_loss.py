"""utils/training/loss.py: the loss against torch's with soft labels, and mixed images pixel by pixel."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.conftest import TINY, settings
from utils.data.image_list import list_in_memory
from utils.training.datasets import Data
from utils.training.loss import Batch, TrainingLoss
from utils.training.trainer import build_trainer

CLASSES = 4


def flat_images(count: int = CLASSES, size: tuple[int, int] = (20, 30)) -> tuple[Tensor, Tensor]:
    """Image i has class i and the value 60 * i in every pixel."""
    class_ids = torch.arange(count)
    pixels = (60 * class_ids).to(torch.uint8)[:, None, None, None].expand(-1, 3, *size)
    return pixels.contiguous(), class_ids


def soft_labels(loss: TrainingLoss, batch) -> Tensor:
    """Labels as probabilities (B, classes), without smoothing."""
    own, other = (F.one_hot(ids, CLASSES).float() for ids in (batch.class_ids, batch.mixed_class_ids))
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
def test_loss_matches_torch_with_soft_labels(weights, options):
    loss = TrainingLoss(weights, **options)
    batch = loss.mix(*flat_images(), seed=3)
    logits = torch.randn(CLASSES, CLASSES, generator=torch.Generator().manual_seed(0))
    expected = F.cross_entropy(
        logits, soft_labels(loss, batch), weights, reduction="none", label_smoothing=loss.label_smoothing
    )
    torch.testing.assert_close(loss(logits, batch), expected)
    assert (batch.share == 1) == ("mixup" not in options)


@pytest.mark.parametrize("mixup", [0.0, 0.4])
def test_class_weights_apply_to_images_with_smoothed_labels(mixup):
    """The weight is that of the true class, not of the classes that smoothing adds."""
    weights = torch.tensor([0.5, 1.0, 2.0, 0.5])
    loss = TrainingLoss(weights, label_smoothing=0.1, mixup=mixup)
    batch = loss.mix(*flat_images(), seed=3)
    logits = torch.randn(CLASSES, CLASSES, generator=torch.Generator().manual_seed(0))
    own, other = (
        weights[ids] * F.cross_entropy(logits, F.one_hot(ids, CLASSES).float(), reduction="none", label_smoothing=0.1)
        for ids in (batch.class_ids, batch.mixed_class_ids)
    )
    torch.testing.assert_close(loss(logits, batch), batch.share * own + (1 - batch.share) * other)
    assert (batch.share == 1) == (mixup == 0)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_balanced_weights_do_not_change_the_predicted_class(smoothing):
    """A hundred common images and a rare one: at the minimum of the loss each gets its own class."""
    loss = TrainingLoss(torch.tensor([0.505, 50.5]), smoothing)
    logits = torch.zeros(2, 2, requires_grad=True)  # a common image, the rare image
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


def test_mixup_blends_images_by_the_share_of_the_label():
    pixels, class_ids = flat_images()
    loss = TrainingLoss(mixup=1.0)
    shares = []
    for seed in range(300):
        batch = loss.mix(pixels, class_ids, seed)
        assert torch.equal(batch.class_ids, class_ids)
        assert not (batch.mixed_class_ids == class_ids).any()
        expected = 60 * (batch.share * class_ids + (1 - batch.share) * batch.mixed_class_ids)
        assert (batch.inputs.float() - expected.view(-1, 1, 1, 1)).abs().max() <= 0.5 + 1e-3
        assert torch.equal(batch.main_class_ids, class_ids if batch.share >= 0.5 else batch.mixed_class_ids)
        shares.append(batch.share)
    # Beta(1, 1) is uniform.
    assert np.quantile(shares, [0.1, 0.5, 0.9]) == pytest.approx([0.1, 0.5, 0.9], abs=0.08)


def test_cutmix_share_is_the_remaining_area():
    pixels, class_ids = flat_images()
    loss = TrainingLoss(cutmix=1.0)
    edges = 0
    for seed in range(300):
        batch = loss.mix(pixels, class_ids, seed)
        unchanged = (batch.inputs == pixels)[:, 0].float().mean(dim=(1, 2))
        assert unchanged.tolist() == pytest.approx([batch.share] * CLASSES)
        cut = (batch.inputs != pixels)[0, 0]
        assert torch.equal(
            batch.inputs[0, :, cut].unique(), (60 * batch.mixed_class_ids[:1]).to(torch.uint8)[: int(cut.any())]
        )
        rows, columns = cut.any(1).nonzero().flatten(), cut.any(0).nonzero().flatten()
        assert cut.sum() == len(rows) * len(columns)  # a box
        if len(rows):
            assert len(rows) == rows[-1] - rows[0] + 1
            edges += int(rows[0] == 0 or rows[-1] == 19 or columns[0] == 0 or columns[-1] == 29)
    assert 30 < edges < 290


def test_seed_chooses_between_mixup_and_cutmix():
    pixels, class_ids = flat_images()
    loss = TrainingLoss(mixup=1.0, cutmix=1.0)
    cut = [len(loss.mix(pixels, class_ids, seed).inputs[1].unique()) == 2 for seed in range(200)]
    assert 60 < sum(cut) < 140
    first, again = (loss.mix(pixels, class_ids, 5) for _ in range(2))
    assert torch.equal(first.inputs, again.inputs)
    assert first.share == again.share


def test_features_and_plain_batches_are_not_mixed():
    pixels, class_ids = flat_images()
    features = torch.randn(CLASSES, 5, 8)
    assert TrainingLoss(mixup=1.0, cutmix=1.0).mix(features, class_ids, 1).inputs is features
    assert TrainingLoss().mix(pixels, class_ids, 1).inputs is pixels


def test_micro_batches_make_up_the_batch():
    batch = TrainingLoss(mixup=1.0).mix(*flat_images(), seed=1)
    parts = list(batch.split(3))
    assert torch.equal(torch.cat([part.inputs for part in parts]), batch.inputs)
    assert torch.equal(torch.cat([part.mixed_class_ids for part in parts]), batch.mixed_class_ids)
    assert {part.share for part in parts} == {batch.share}


@pytest.mark.parametrize(("counts", "printed"), [((20, 20), True), ((24, 16), False)])
def test_class_weights_of_equal_classes_are_reported(here, capsys, counts, printed):
    images = list_in_memory((class_id, "x.png") for class_id, count in enumerate(counts) for _ in range(count))
    config = settings(**TINY | {"class_weights": "balanced"})
    build_trainer(config, Data(["a", "b"], images, images), torch.device("cpu"), "fp32")
    assert ("class_weights=balanced: changes nothing" in capsys.readouterr().out) == printed
