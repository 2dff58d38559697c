"""Distillation: a network learns the probabilities of a trained one."""

import shutil

import pytest
import torch
from torch.distributions import Categorical, kl_divergence

import train
from tests.conftest import TINY, settings, train_one_epoch
from tests.faults.harness import digest
from utils.inference.classifier import load_classifier
from utils.runs.checkpoint import BEST, LAST, find_checkpoint, load_checkpoint
from utils.runs.teacher import load_teacher
from utils.training.loss import DISTILL_TEMPERATURE, DISTILLED, TrainingLoss, divergence
from utils.training.stages import num_cached_views, plan_stages

CPU = torch.device("cpu")
STUDENT = TINY | {"save_dir": "students", "recipe": "none"}


def pixels(count: int = 6, side: int = 32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(256, (count, 3, side, side), generator=generator, dtype=torch.uint8)


def test_the_loss_is_half_cross_entropy_and_half_divergence():
    """The divergence against torch.distributions; its gradient is the difference of the probabilities (Hinton et al.,
    2015, equation 2)."""
    logits, targets = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    logits.requires_grad_()
    t = DISTILL_TEMPERATURE
    expected = t**2 * kl_divergence(Categorical(logits=targets / t), Categorical(logits=logits / t))
    torch.testing.assert_close(divergence(logits, targets, t), expected)
    (gradient,) = torch.autograd.grad(divergence(logits, targets, t).sum(), logits)
    torch.testing.assert_close(gradient, t * ((logits / t).softmax(1) - (targets / t).softmax(1)))

    batch = TrainingLoss().mix(pixels(5), torch.tensor([0, 1, 2, 0, 1]), seed=0)
    loss = TrainingLoss(teacher=lambda images: targets)(logits, batch)
    hard = torch.nn.functional.cross_entropy(logits, batch.class_ids, reduction="none")
    torch.testing.assert_close(loss, (1 - DISTILLED) * hard + DISTILLED * expected)


def test_the_teacher_sees_mixed_images():
    seen = []
    loss = TrainingLoss(mixup=1.0, teacher=lambda images: seen.append(images) or torch.zeros(6, 3))
    batch = loss.mix(pixels(), torch.arange(6) % 3, seed=3)
    loss(torch.zeros(6, 3), batch)
    assert seen[0] is batch.inputs
    assert batch.share < 1


def test_the_teacher_gives_the_logits_of_its_checkpoint_in_the_order_of_the_student(trained):
    config = settings(distill_from=str(find_checkpoint("").parent))
    names = load_checkpoint(find_checkpoint(""))["class_names"]
    teacher = load_teacher(config, names[::-1], CPU, "fp32")
    classifier = load_classifier("", "cpu", precision="fp32")
    images = pixels(side=classifier.preprocessing.input_shape[0])
    _, wanted = classifier.forward(images)
    torch.testing.assert_close(teacher(images), wanted.flip(1))
    assert teacher(pixels(side=48)).shape == wanted.shape  # resized to what it was trained on
    assert not teacher(images).requires_grad


def test_a_teacher_must_know_the_classes(trained):
    names = load_checkpoint(find_checkpoint(""))["class_names"]
    with pytest.raises(ValueError, match="it doesn't know the classes okapi; train it on the sa"):
        load_teacher(settings(distill_from=str(find_checkpoint("").parent)), [*names, "okapi"], CPU, "fp32")
    for place in ("nowhere", "logs"):  # in a folder of runs, the newest one may be the student
        with pytest.raises(FileNotFoundError, match=f"distill_from='{place}': must be the folder of a run that has"):
            load_teacher(settings(distill_from=place), names, CPU, "fp32")


def test_a_stage_with_a_teacher_trains_on_images():
    for changes, views in (({}, 4), ({"distill_from": "logs"}, 0)):
        config = settings(freeze_epoch=10, unfreeze_epoch=10, **changes)
        (stage,) = plan_stages(config, 100, transformer=True)
        assert num_cached_views(stage, config) == views


def test_a_student_follows_its_teacher_and_an_interrupted_one_ends_equal(two_classes, here, monkeypatch):
    train.main(settings(**TINY | {"recipe": "none"}))
    (run,) = (here / "logs").iterdir()
    teacher = here / "teacher.safetensors"
    shutil.copy(run / BEST, teacher)

    def students_weights(**changes):
        train.main(settings(**STUDENT | changes))
        newest = max((here / "students").iterdir(), key=lambda folder: folder.stat().st_mtime_ns)
        shutil.move(newest, here / f"done{len(list(here.glob('done*')))}")
        return digest(load_checkpoint(max(here.glob("done*")) / LAST)["weights"])

    alone, taught = students_weights(), students_weights(distill_from=str(teacher))
    assert alone != taught

    train_one_epoch(settings(**STUDENT | {"distill_from": str(teacher)}), monkeypatch)
    assert students_weights(distill_from=str(teacher)) == taught


def test_folds_have_no_teacher(two_classes, here):
    with pytest.raises(ValueError, match="cross_validate: a teacher has seen the images of the folds"):
        train.main(settings(**TINY | {"distill_from": "logs"}), cross_validate=2)
