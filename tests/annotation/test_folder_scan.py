"""Tests of utils/annotation/folder_scan.py."""

import os
from collections import Counter
from pathlib import Path

import pytest

from tests.conftest import touch
from utils.annotation.annotate import annotate
from utils.annotation.folder_scan import SYSTEM_FOLDERS, find_images, scan_datasets, split_of

LISTS = ("cls_train.txt", "cls_val.txt", "cls_test.txt")


def num_lines(name: str) -> int:
    return len(Path(name).read_text(encoding="utf-8").splitlines())


NAMES_OF_SPLITS = {
    "train": "train Train TRAINING train_data training_set seg_train trainset TrainData train-images train2017 训练集",
    "val": "val valid validation Validation_Set dev val2017 validset 验证集",
    "test": "test TEST Testing test_set test_data seg_test testset images_test 测试",
}


@pytest.mark.parametrize(
    ("split", "name"), [(split, name) for split, names in NAMES_OF_SPLITS.items() for name in names.split()]
)
def test_usual_names_of_splits(split, name):
    assert split_of(name) == split


@pytest.mark.parametrize("name", ["cat", "train_station", "test tube", "steam train", "data", "set", "2023", "", "_"])
def test_other_names_are_no_splits(name):
    assert split_of(name) is None


@pytest.mark.parametrize(
    "names",
    [
        ("Train", "valid", "TEST"),
        ("Training", "Validation", "Testing"),
        ("train_data", "val_data", "test_data"),
        ("training_set/training_set", "val", "test_set/test_set"),
        ("seg_train/seg_train", "seg_val", "seg_test/seg_test"),
    ],
)
def test_split_folders_by_other_names(here, names):
    touch(*(f"datasets/{split}/{name}/{i}.jpg" for split in names for name in ("cat", "dog") for i in range(3)))
    annotate(audit=False)
    assert Path("model_data/cls_classes.txt").read_text() == "cat\ndog\n"
    assert [num_lines(name) for name in LISTS] == [6, 6, 6]


def test_repeated_split_folder_beside_images_is_a_class(here):
    touch(*(f"datasets/train/{name}/{i}.jpg" for name in ("train/steam", "bus") for i in range(3)))
    assert set(scan_datasets("datasets").images["train"]) == {"train", "bus"}


def test_unlabeled_test_images_are_reported(here, capsys):
    touch(*(f"datasets/{name}/{i}.jpg" for name in ("train/a", "train/b", "test") for i in range(4)))
    annotate(audit=False)
    assert "warning: 4 images of test not in the lists: a split without class folders: put" in capsys.readouterr().out


def test_links_to_folders_are_followed(here):
    touch(*(f"elsewhere/{place}/{i}.jpg" for place in ("day", "night/late") for i in range(3)), "datasets/cat/0.jpg")
    for name in ("day", "night"):
        os.symlink(here / "elsewhere" / name, f"datasets/cat/{name}")
    os.symlink(here / "elsewhere" / "day", "datasets/dog")
    scan = scan_datasets("datasets")
    expected = ["0.jpg", *(f"{place}/{i}.jpg" for place in ("day", "night/late") for i in range(3))]
    assert scan.images["train"]["cat"] == [f"datasets/cat/{name}" for name in expected]
    assert scan.images["train"]["dog"] == [f"datasets/dog/{i}.jpg" for i in range(3)]
    assert not +scan.skipped["cat"]


def test_loops_of_links_are_caught(here):
    touch("datasets/train/cat/a/1.jpg", "datasets/train/cat/b/2.jpg", "datasets/train/dog/3.jpg", "other/4.jpg")
    os.symlink("..", "datasets/train/cat/a/up")
    os.symlink(here / "datasets", "datasets/train/cat/0 all")
    os.symlink("a", "datasets/train/cat/0 same")
    os.symlink(here / "other", "datasets/train/cat/b/other")
    os.symlink(here / "datasets/train/cat/a", "other/back")
    os.symlink("self", "datasets/train/cat/self")
    os.symlink(here, "datasets/train/everything")
    scan = scan_datasets("datasets")
    names = ("a/1.jpg", "b/2.jpg", "b/other/4.jpg")  # by their own names, not by those of links to them
    assert scan.images["train"]["cat"] == [f"datasets/train/cat/{name}" for name in names]
    assert scan.skipped["cat"] == {
        "a link to a folder above it": 2,
        "a link to a folder already read": 2,
        "not an image (no suffix)": 1,
    }
    assert "everything" not in scan.images["train"]


def test_link_to_a_folder_that_contains_the_class_is_followed_once(here):
    touch("datasets/cat/1.jpg", "datasets/dog/2.jpg")
    os.symlink(here / "datasets/dog", "datasets/cat/x")
    os.symlink(here / "datasets/cat", "datasets/dog/x")
    assert find_images("datasets/cat", Counter()) == ["datasets/cat/1.jpg", "datasets/cat/x/2.jpg"]


@pytest.mark.parametrize("name", sorted(SYSTEM_FOLDERS | {"@eaDir", "__MACOSX", "$RECYCLE.BIN"}))
def test_folders_of_systems_are_no_classes(here, name):
    touch(f"datasets/{name}/1.jpg", f"datasets/a/{name}/1.jpg", "datasets/a/1.jpg", "datasets/b/1.jpg")
    scan = scan_datasets("datasets")
    assert scan.images["train"] == {"a": ["datasets/a/1.jpg"], "b": ["datasets/b/1.jpg"]}
    assert scan.skipped["a"] == {"hidden": 1}
    touch(f"split/train/{name}/1.jpg", "split/train/a/1.jpg")
    assert set(scan_datasets("split").images["train"]) == {"a"}


def test_classes_from_nested_folders(here):
    touch("datasets/Fruit/Apple/Fuji/1.jpg", "datasets/Fruit/Pear/2.jpg", "datasets/Fruit/3.jpg")
    touch("datasets/Juice/Apple/4.jpg", "datasets/Juice/Pear/5.jpg")
    numbers = {
        classes_from: {
            name: [int(Path(path).stem) for path in paths]
            for name, paths in scan_datasets("datasets", classes_from).images["train"].items()
        }
        for classes_from in ("top", "leaf", "path")
    }
    assert numbers == {
        "top": {"Fruit": [3, 1, 2], "Juice": [4, 5]},
        "leaf": {"Fruit": [3], "Fuji": [1], "Pear": [2, 5], "Apple": [4]},
        "path": {"Fruit": [3], "Fruit/Apple/Fuji": [1], "Fruit/Pear": [2], "Juice/Apple": [4], "Juice/Pear": [5]},
    }


@pytest.mark.parametrize(("folders", "classes_from"), [(" ", "top"), ("a/ ", "leaf"), ("a/ ", "path")])
def test_a_class_folder_with_a_blank_name_is_no_class_but_an_error(here, folders, classes_from):
    """The class file can't hold it, and its images must not be missing in silence."""
    touch(f"datasets/train/{folders}/1.jpg", "datasets/train/b/1.jpg")
    with pytest.raises(ValueError, match=rf"the class folder '{folders}' has a blank name: rename it"):
        scan_datasets("datasets", classes_from)
