"""Tests of utils/annotation/classes.py: which classes a project has, and what is said of the images that have none."""

import re
import shlex
from pathlib import Path

import pytest
import tyro

from tests.conftest import touch
from utils.annotation.annotate import annotate
from utils.data.image_list import read_classes

CLASSES = "model_data/cls_classes.txt"


def commands(text: str) -> list[str]:
    return re.findall(r"python \S*txt_annotation\.py[^\n]*", text)


def run_command(line: str) -> None:
    """Run a command as it was printed."""
    python, script, *arguments = shlex.split(line)
    assert (python, Path(script).name, Path(script).is_file()) == ("python", "txt_annotation.py", True)
    tyro.cli(annotate, args=arguments)


def test_class_that_the_class_file_lacks(here, capsys):
    touch(*(f"datasets/{name}/{i}.jpg" for name in ("banana", "apple", "pear") for i in range(10)))
    Path("model_data").mkdir()
    Path(CLASSES).write_text("pear\napple\n")
    annotate(test_fraction=0.2, audit=False)
    output = capsys.readouterr().out
    assert "banana      -    -     -  10 images: not in the class file" in output
    assert "no test folder with images: 4 images (20.0%) held out from train" in output
    assert "no val folder with images: 2 images (10.0%) held out from train" in output
    assert "written: cls_train.txt, cls_val.txt, cls_test.txt\n" in output
    last = output.splitlines()[-1]
    assert last.startswith(f"warning: 10 images of banana not in the lists: not in the class file, {CLASSES}; to add")
    run_command(*commands(last))
    assert read_classes(CLASSES) == ["pear", "apple", "banana"]
    output = capsys.readouterr().out
    assert "warning" not in output
    assert f"written: {CLASSES}, cls_train.txt" in output
    assert len(Path("cls_train.txt").read_text().splitlines()) == 21


def test_class_file_is_rewritten_by_the_printed_command(here, capsys):
    touch(*(f"datasets/{name}/{i}.jpg" for name in ("apple", "pear") for i in range(4)))
    Path("model_data").mkdir()
    Path(CLASSES).write_text("cat\ndog\n")
    with pytest.raises(ValueError, match="none of its classes") as error:
        annotate(audit=False)
    run_command(*commands(str(error.value)))
    assert read_classes(CLASSES) == ["apple", "pear"]


NESTED = [
    ("2023", "2024"),
    ("north", "south", "west"),
]


@pytest.mark.parametrize("tops", NESTED)
@pytest.mark.parametrize("root", ["datasets", "datasets/train"])
def test_folders_that_share_their_subfolders_are_an_error(here, tops, root):
    touch(*(f"{root}/{top}/{name}/{i}.jpg" for top in tops for name in ("cat", "dog") for i in range(5)))
    with pytest.raises(ValueError, match=rf"{root}: {', '.join(tops)} contain no images .* \(cat, dog\)") as error:
        annotate(audit=False)
    leaf, _ = commands(str(error.value))
    assert not Path("cls_train.txt").exists()
    run_command(leaf)
    assert read_classes(CLASSES) == ["cat", "dog"]
    with pytest.raises(ValueError, match="contain no images") as error:
        annotate(audit=False)
    _, top = commands(str(error.value))
    run_command(top)
    assert read_classes(CLASSES) == list(tops)


def test_splits_by_unknown_names_are_an_error(here):
    touch(*(f"datasets/Training/{name}/{i}.jpg" for name in ("cat", "dog", "fox") for i in range(5)))
    touch(*(f"datasets/Holdout/{name}/{i}.jpg" for name in ("cat", "dog") for i in range(5)))
    Path("datasets/Training").rename("datasets/Learn")
    with pytest.raises(ValueError, match="if Holdout, Learn are splits: rename them to train, val and test"):
        annotate(audit=False)


def test_splits_below_the_classes_are_an_error(here):
    touch(*(f"datasets/{name}/{split}/1.jpg" for name in ("cats", "dogs") for split in ("train", "test")))
    with pytest.raises(ValueError, match=r"if test, train are splits of one data set: move.*datasets/test/cats/"):
        annotate(audit=False)


def test_two_data_sets_are_an_error(here):
    sets, names = ("pets", "birds"), ("train/a", "train/b", "test/a", "test/b")
    touch(*(f"datasets/{data}/{name}/{i}.jpg" for data in sets for name in names for i in range(4)))
    with pytest.raises(ValueError, match=r"if birds, pets are data sets: choose one") as error:
        annotate(audit=False)
    run_command(commands(str(error.value))[0])
    assert read_classes(CLASSES) == ["a", "b"]
    assert "datasets/birds/train/a/" in Path("cls_train.txt").read_text()


@pytest.mark.parametrize("inside", [("cat", "dog"), ("train/cat", "train/dog", "test/cat", "test/dog")])
def test_data_in_a_single_folder(here, inside):
    touch(*(f"datasets/my pets/{name}/{i}.jpg" for name in inside for i in range(4)))
    with pytest.raises(ValueError, match=r"at least two classes are needed.*my pets has the folders") as error:
        annotate(audit=False)
    run_command(*commands(str(error.value)))
    assert read_classes(CLASSES) == ["cat", "dog"]


@pytest.mark.parametrize(
    "names",
    [
        ("cat/images", "dog/images"),
        ("cat/burst 1", "cat/burst 2", "dog/burst 3"),
        ("cat", "cat/left", "cat/right", "dog", "dog/left", "dog/right"),
        ("animals/cat", "animals/dog", "animals/other", "plants/fern", "plants/moss", "plants/other"),
    ],
)
def test_nested_classes_are_no_error(here, names):
    touch(*(f"datasets/{name}/{i}.jpg" for name in names for i in range(4)))
    annotate(audit=False)
    assert read_classes(CLASSES) == sorted({name.partition("/")[0] for name in names})


def test_nested_folders_are_hinted_at(here, capsys):
    leaves = [f"Fruit/{name}" for name in ("Apple", "Pear", "Plum")] + ["Packages/Milk/Oat", "Packages/Milk/Soy"]
    touch(*(f"datasets/{name}/{i}.jpg" for name in leaves for i in range(4)))
    annotate(audit=False)
    (note,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note:")]
    assert note.startswith("note: 2 classes of 5 folders with images; to make each of these folders a class: ")
    run_command(*commands(note))
    assert read_classes(CLASSES) == ["Apple", "Oat", "Pear", "Plum", "Soy"]
    assert "note:" not in capsys.readouterr().out
    annotate(audit=False, classes_from="top", class_file="rewrite")
    assert "note:" not in capsys.readouterr().out


def test_folders_of_the_same_name_are_kept_apart_by_their_paths(here, capsys):
    leaves = ["Fruit/Apple", "Fruit/Pear", "Juice/Apple", "Juice/Orange"]
    touch(*(f"datasets/{name}/{i}.jpg" for name in leaves for i in range(4)))
    annotate(audit=False)
    run_command(*commands(capsys.readouterr().out.partition("note: 2 classes of 4 folders")[2]))
    assert read_classes(CLASSES) == leaves
    annotate(audit=False, classes_from="leaf", class_file="rewrite")
    output = capsys.readouterr().out
    assert read_classes(CLASSES) == ["Apple", "Orange", "Pear"]
    assert "note: folders of the same name are one class: Apple (datasets/Fruit/Apple, datasets/Juice/Apple)" in output
    run_command(*commands(output.partition("note: folders")[2]))
    assert read_classes(CLASSES) == leaves


@pytest.mark.parametrize("class_file", [None, "cat\ndog\n"])
def test_names_that_differ_in_case_are_an_error(here, class_file):
    touch(*(f"datasets/train/{name}/{i}.jpg" for name in ("Cat", "dog") for i in range(4)))
    touch(*(f"datasets/val/{name}/{i}.jpg" for name in ("cat", "dog") for i in range(4)))
    if class_file:
        Path("model_data").mkdir()
        Path(CLASSES).write_text(class_file)
    folder = "train folder Cat and the class cat" if class_file else "val folder cat and the class Cat"
    for choice in ("keep", "add"):
        with pytest.raises(ValueError, match=rf"the {folder} differ only in upper and lower case: rename one"):
            annotate(audit=False, class_file=choice)


def test_upper_and_lower_case_letters_may_be_classes(here):
    touch(*(f"datasets/{split}/{name}/1.jpg" for split in ("train", "val") for name in "aAbB"))
    annotate(audit=False)
    assert read_classes(CLASSES) == ["A", "B", "a", "b"]


def test_messages_list_few_of_many_names(here, capsys):
    touch(*(f"datasets/class {i}/{k}.jpg" for i in range(90) for k in range(2)))
    annotate(audit=False)
    Path(CLASSES).write_text("class 1\nclass 2\n" + "".join(f"other {i}\n" for i in range(90)))
    annotate(audit=False)
    assert max(map(len, capsys.readouterr().out.partition("written:")[2].splitlines())) < 250
    Path(CLASSES).write_text("".join(f"other {i}\n" for i in range(90)))
    with pytest.raises(ValueError, match="none of its classes") as error:
        annotate(audit=False)
    assert len(str(error.value)) < 400
