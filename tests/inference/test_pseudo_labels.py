"""Unlabeled images, trained on with the classes that a teacher predicts."""

import shutil

import pytest

import train
from tests.conftest import TINY, settings, train_one_epoch, write_image
from utils.data.image_list import list_in_memory, read_list
from utils.inference.classifier import load_classifier
from utils.inference.pseudo_labels import MAX_ERROR, add_unlabeled, append
from utils.runs.checkpoint import BEST
from utils.runs.folder import LIST_FILES
from utils.training.datasets import load_data


@pytest.fixture
def taught(two_classes, here):
    """The settings of a student, with a finished run as its teacher, and unlabeled images."""
    train.main(settings(**TINY | {"recipe": "none"}))
    (run,) = (here / "logs").iterdir()
    shutil.copy(run / BEST, here / "teacher.safetensors")
    photos = here / "photos"
    (photos / "more").mkdir(parents=True)
    for i, image in enumerate(sorted(two_classes.rglob("*.png"))[:12]):
        shutil.copy(image, photos / f"copy{i}.png")
    for i in range(20):
        write_image(photos / "more" / f"{i}.png", level=(60, 190)[i % 2], seed=1000 + i)
    return settings(**TINY | {"distill_from": "teacher.safetensors", "unlabeled": "photos", "save_dir": "students"})


def test_accepted_images_join_the_training_list_with_the_predicted_class(taught, here, capsys):
    data = load_data(taught)
    more = add_unlabeled(taught, data).train_images
    classifier = load_classifier("teacher.safetensors", "cpu")
    rejection = classifier.calibration.choose_rejection(MAX_ERROR)
    paths = [str(here / "photos" / "more" / f"{i}.png") for i in range(20)]
    wanted = {p.path: p.label for p in classifier.predict(paths, rejection=rejection) if not p.rejected}
    added = range(len(data.train_images), len(more))
    assert {more.path(i): data.class_names[more.class_ids[i]] for i in added} == wanted
    assert [more.name(i) for i in range(len(data.train_images))] == [
        data.train_images.name(i) for i in range(len(data.train_images))
    ]
    assert f"20 images in photos, {len(wanted)} trained on" in capsys.readouterr().out


def test_a_list_without_a_last_line_break_can_be_extended(here):
    (here / "a").mkdir()
    (here / "a" / "list.txt").write_text("1;x.png\n0;y.png")
    images = append(read_list("a/list.txt", 2), list_in_memory([(1, "/photos/z.png")]))
    assert [images.path(i) for i in range(3)] == ["a/x.png", "a/y.png", "/photos/z.png"]
    assert images.class_ids.tolist() == [1, 0, 1]
    assert len(append(images, list_in_memory([]))) == 3


def test_a_run_with_unlabeled_images_resumes(taught, here, monkeypatch):
    train_one_epoch(taught, monkeypatch)
    train.main(taught)
    (run,) = (here / "students").iterdir()
    assert len(read_list(run / LIST_FILES["train"], 2)) == len(add_unlabeled(taught, load_data(taught)).train_images)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"distill_from": ""}, "unlabeled='photos': set distill_from to a run that predicts"),
        ({"unlabeled": "nowhere"}, "unlabeled='nowhere': there is no such folder"),
        ({"unlabeled": "datasets"}, "unlabeled='datasets': it has no images besides those of the lists"),
    ],
)
def test_what_is_missing_is_named(taught, changes, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        train.main(settings(**vars(taught) | changes))
