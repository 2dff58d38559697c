"""Tests of utils/annotation/annotate.py."""

import functools
import os
import re
import shutil
import unicodedata
from collections import Counter
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from tests.conftest import touch, write_image
from utils.annotation.annotate import annotate, demo_digits, ensure_lists
from utils.annotation.folder_scan import SPLITS
from utils.config.train_config import TrainConfig
from utils.data.image_list import read_classes, read_list, write_classes
from utils.evaluation.eval_lists import list_folder
from utils.system.files import WriteError
from utils.training.datasets import load_data

LISTS = ("cls_train.txt", "cls_val.txt", "cls_test.txt", "model_data/cls_classes.txt")


def entries(name: str) -> list[str]:
    return Path(name).read_text(encoding="utf-8").splitlines()


def test_splits_and_classes(two_classes, capsys):
    annotate()
    assert read_classes("model_data/cls_classes.txt") == ["dark", "light"]
    assert entries("cls_test.txt") == [f"0;datasets/test/dark/{i:02d}.png" for i in range(6)] + [
        f"1;datasets/test/light/{i:02d}.png" for i in range(5)
    ]
    train, val = set(entries("cls_train.txt")), set(entries("cls_val.txt"))
    assert not train & val
    assert len(train | val) == 40
    assert [sum(line.startswith(f"{k};") for line in val) for k in (0, 1)] == [2, 2]  # a tenth of 24 and of 16
    assert entries("cls_train.txt") == sorted(train)
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["dark", "22", "2", "6"] in rows
    assert ["light", "14", "2", "5"] in rows
    assert ["all", "36", "4", "11"] in rows


def test_a_second_run_gives_the_same_bytes(two_classes):
    annotate()
    first = [Path(name).read_bytes() for name in LISTS]
    annotate()
    assert [Path(name).read_bytes() for name in LISTS] == first


def test_class_folders_without_splits(here):
    touch(*(f"datasets/{name}/{i}.jpg" for name in ("cat", "dog") for i in range(5)))
    annotate()
    assert len(entries("cls_train.txt")) == 8
    assert len(entries("cls_val.txt")) == 2
    assert not Path("cls_test.txt").exists()


def test_composed_and_decomposed_class_names_are_one_class(here):
    """macOS decomposes names."""
    composed = ("Käse", "한글")
    for split, form in (("train", "NFD"), ("test", "NFC")):
        for name in composed:
            touch(*(f"datasets/{split}/{unicodedata.normalize(form, name)}/{i}.png" for i in range(3)))
    touch("datasets/train/Käse/3.png")
    annotate()
    assert read_classes("model_data/cls_classes.txt") == list(composed)
    assert len(read_list("cls_test.txt", 2)) == 6
    assert len(list_folder("datasets/train", list(composed))) == 7
    Path("model_data/cls_classes.txt").write_text(unicodedata.normalize("NFD", "\n".join(composed)), encoding="utf-8")
    assert read_classes("model_data/cls_classes.txt") == list(composed)


def test_val_folder_is_used_unchanged(here):
    touch(*(f"datasets/{split}/{name}/{i}.jpg" for split in ("train", "val") for name in "ab" for i in range(3)))
    annotate()
    assert entries("cls_val.txt") == [
        f"{k};datasets/val/{name}/{i}.jpg" for k, name in enumerate("ab") for i in range(3)
    ]
    assert len(entries("cls_train.txt")) == 6


def test_list_of_a_missing_test_folder_is_renamed(here, capsys):
    touch(*(f"datasets/{name}/{i}.jpg" for name in "ab" for i in range(2)), "cls_test.txt")
    annotate()
    assert not Path("cls_test.txt").exists()
    assert Path("cls_test.txt.old").exists()
    assert "there are no test images: cls_test.txt was renamed to cls_test.txt.old" in capsys.readouterr().out


def test_names_and_suffixes(here, capsys):
    kept = ["1.JPG", "2.Png", "a b;c'\".jpeg", "猫.webp", "deeper/still/3.bmp"]
    touch(*(f"datasets/ä b/{name}" for name in kept), "datasets/z/1.jpg")
    touch("datasets/ä b/notes.txt", "datasets/ä b/.hidden.jpg", "datasets/ä b/none", "datasets/ä b/.git/x.jpg")
    touch("datasets/loose.jpg", "datasets/README.md")
    os.mkdir("datasets/empty")
    annotate()
    listed = {line.partition(";")[2] for line in entries("cls_train.txt") + entries("cls_val.txt")}
    assert listed == {f"datasets/ä b/{name}" for name in kept} | {"datasets/z/1.jpg"}
    output = capsys.readouterr().out
    assert "2 hidden, 1 not an image (.txt), 1 not an image (no suffix)" in output
    assert "1 no images in datasets" in output
    assert "1 outside the class folders" in output


@pytest.mark.parametrize("fraction", [0, 1, -0.1])
def test_invalid_val_fraction(two_classes, fraction):
    with pytest.raises(ValueError, match="val_fraction"):
        annotate(val_fraction=fraction)


def test_class_file_is_used(two_classes, capsys):
    write_image(two_classes / "train" / "other" / "1.png")
    Path("model_data").mkdir()
    Path("model_data/cls_classes.txt").write_text("light\ndark\nmissing\n")
    annotate()
    assert entries("cls_test.txt")[0].startswith("0;datasets/test/light")
    assert not any("other" in line for line in entries("cls_train.txt") + entries("cls_val.txt"))
    output = capsys.readouterr().out
    assert "1 image: not in the class file" in output
    assert re.search(r"warning: no train images of missing; to remove such classes: .*--class-file rewrite\n", output)


def test_class_file_without_matching_folders(two_classes):
    Path("model_data").mkdir()
    Path("model_data/cls_classes.txt").write_text("cat\ndog\n")
    with pytest.raises(
        ValueError, match=r"none of its classes \(cat, dog\) is a folder.*there are: dark, light.*--class-file rewrite"
    ):
        annotate()


def test_classes_only_in_test_are_skipped(two_classes, capsys):
    write_image(two_classes / "test" / "new" / "1.png")
    annotate()
    assert read_classes("model_data/cls_classes.txt") == ["dark", "light"]
    assert "warning: 1 image of new not in the lists: no training images" in capsys.readouterr().out


def test_invalid_folders(here):
    with pytest.raises(FileNotFoundError, match="no folder datasets"):
        annotate()
    touch("datasets/a/1.jpg")
    with pytest.raises(ValueError, match=r"folders with training images: a$"):
        annotate()
    touch("datasets/b/notes.doc")
    with pytest.raises(ValueError, match=r"training images: a; skipped: 1 not an image \(\.doc\), 1 no images"):
        annotate()
    touch("datasets/test/a/1.jpg")
    with pytest.raises(ValueError, match="no train/"):
        annotate()


def test_absolute_datasets_path_and_other_list_paths(two_classes, tmp_path):
    annotate(datasets_path=two_classes)
    assert entries("cls_test.txt")[0] == f"0;{two_classes.as_posix()}/test/dark/00.png"
    os.mkdir("lists")
    annotate(train_annotation_path="lists/t.txt", val_annotation_path="lists/v.txt")
    assert entries("lists/t.txt")[0].startswith("0;../datasets/train/dark/")
    assert os.path.isfile(read_list("lists/t.txt", 2).path(0))


def test_digits_are_a_project_of_their_own(here, capsys):
    assert ensure_lists(TrainConfig(demo=True)) == "demo"
    assert "training on handwritten digits" in capsys.readouterr().out
    assert read_classes("demo/cls_classes.txt") == list(demo_digits.CLASSES)
    assert [len(read_list(f"demo/{name}", 10)) for name in LISTS[:3]] == [1294, 144, 359]
    assert sorted(path.name for path in here.iterdir()) == ["demo"]
    touch("datasets/train/cat/1.jpg", "datasets/train/cat/2.jpg", "datasets/train/7/3.jpg", "datasets/train/7/4.jpg")
    assert ensure_lists(TrainConfig(demo=True)) == ""
    assert read_classes("model_data/cls_classes.txt") == ["7", "cat"]
    assert len(entries("cls_train.txt")) + len(entries("cls_val.txt")) == 4


def test_without_images_the_digits_are_only_for_who_asks_for_them(here):
    Path("datasets").mkdir()
    with pytest.raises(FileNotFoundError, match=rf"no images in datasets/ of .* {here}: .*--data; --demo"):
        ensure_lists(TrainConfig())
    assert [path.name for path in here.iterdir()] == ["datasets"]
    with pytest.raises(FileNotFoundError, match=r"no class file cats/cls_classes\.txt"):
        load_data(TrainConfig(data=ensure_lists(TrainConfig(data="cats", demo=True))).with_paths())


def test_existing_lists_are_not_overwritten(two_classes):
    annotate()
    before = Path("cls_train.txt").read_bytes()
    write_image(two_classes / "train" / "dark" / "new.png")
    ensure_lists(TrainConfig())
    assert Path("cls_train.txt").read_bytes() == before
    ensure_lists(TrainConfig(train_annotation_path="mine.txt"))
    assert not Path("mine.txt").exists()


def test_classes_named_like_splits(here, capsys):
    touch(*(f"datasets/{name}/{i}.jpg" for name in ("bus", "car", "train") for i in range(3)))
    annotate()
    assert read_classes("model_data/cls_classes.txt") == ["bus", "car", "train"]
    assert "warning: train is used as a class" in capsys.readouterr().out


def test_splits_without_classes(here):
    touch("datasets/train/1.jpg", "datasets/train/2.jpg", "datasets/test/1.jpg", "datasets/test/2.jpg")
    with pytest.raises(ValueError, match="put the images of each class in one"):
        annotate()


def test_test_fraction(here, capsys):
    touch(*(f"datasets/{name}/{i:02d}.jpg" for name in "ab" for i in range(50)))
    annotate(audit=False)
    assert "txt_annotation.py --test-fraction 0.2 --no-audit holds out 20% of train" in capsys.readouterr().out
    annotate(test_fraction=0.2, group_regex=r"^(\d)", audit=False)
    lists = [[line.rpartition("/")[2] for line in entries(name)] for name in LISTS[:3]]
    assert sum(map(len, lists)) == 100
    assert len(lists[2]) == 20
    train, val, test = ({name[0] for name in names} for names in lists)
    assert not (train & test or val & test or train & val)
    annotate(test_fraction=0.5, val_fraction=0.4, audit=False)  # both are fractions of all images
    assert [len(entries(name)) for name in LISTS[:3]] == [10, 40, 50]
    with pytest.raises(ValueError, match=r"cls_test\.txt has images held out from train.*as before"):
        annotate(audit=False)
    assert [len(entries(name)) for name in LISTS[:3]] == [10, 40, 50]
    Path("cls_test.txt").unlink()
    annotate(audit=False)
    assert [len(entries(name)) for name in LISTS[:2]] == [90, 10]
    touch("datasets/train/a/1.jpg", "datasets/train/b/1.jpg", "datasets/test/a/1.jpg")
    with pytest.raises(ValueError, match=r"test_fraction=0\.2: there is a test folder with images"):
        annotate(test_fraction=0.2, audit=False)
    with pytest.raises(ValueError, match="leaves no training images"):
        annotate(test_fraction=0.95, audit=False)


def test_held_out_test_images_never_become_training_images(here):
    touch(*(f"pets/{name}/{i:02d}.jpg" for name in "ab" for i in range(20)))
    fields = ("train_annotation_path", "val_annotation_path", "test_annotation_path")
    places = {field: f"pets/{field}.txt" for field in fields}
    annotate("pets", **places, test_fraction=0.2, audit=False)
    with pytest.raises(ValueError, match=r"test_annotation_path\.txt has images held out from train"):
        annotate("pets", **places, audit=False)


def test_images_beside_the_splits_are_reported(two_classes, capsys):
    touch("datasets/more/1.jpg", "datasets/loose.jpg")
    annotate()
    output = capsys.readouterr().out
    assert "warning: 1 image of more not in the lists: beside the split folders: move it into one of them" in output
    assert "1 outside the class folders" in output


def test_broken_links_and_hidden_folders_are_skipped(here, capsys):
    touch(*(f"datasets/{name}/{i}.jpg" for name in "ab" for i in range(2)), "datasets/.d/0.jpg", "datasets/a/.e/0.jpg")
    Path("datasets/c").symlink_to("gone")
    Path("datasets/.#c").symlink_to("gone")
    annotate(audit=False)
    assert len(entries("cls_train.txt")) + len(entries("cls_val.txt")) == 4
    table = capsys.readouterr().out
    assert ".#c" not in table
    assert re.search(r"^c +- +- +- +1 a broken link$", table, re.MULTILINE)
    assert re.search(r"^a +1 +1 +0 +1 hidden$", table, re.MULTILINE)


@pytest.mark.parametrize("name", ["datasets/loose.jpg", "datasets/train/cat/1.raw", "datasets/train/cat/notes.txt"])
def test_digits_are_not_written_among_other_files(here, name):
    touch(name)
    with pytest.raises(ValueError, match="at least two classes"):
        ensure_lists(TrainConfig(demo=True))
    assert not Path("demo").exists()


def test_readme_and_hidden_files_count_as_empty(here):
    touch("datasets/README.md", "datasets/.DS_Store", "datasets/@eaDir/1.jpg")
    assert ensure_lists(TrainConfig(demo=True)) == "demo"


def test_empty_validation_list_is_an_error(here):
    touch("datasets/a/1.jpg", "datasets/b/1.jpg")
    with pytest.raises(ValueError, match="no val images"):
        annotate()
    touch("datasets/train/a/1.jpg", "datasets/train/b/1.jpg", "datasets/val/c/1.jpg")
    with pytest.raises(ValueError, match="no val images"):
        annotate()
    assert not Path("cls_val.txt").exists()


def test_line_break_in_a_class_name_is_an_error(here):
    touch("datasets/a\nb/1.jpg", "datasets/a\nb/2.jpg", "datasets/c/1.jpg", "datasets/c/2.jpg")
    with pytest.raises(ValueError, match="line break"):
        annotate()
    assert not Path("model_data/cls_classes.txt").exists()


FOLDERS = [f"{split}/{name}" for split in SPLITS for name in ("ant", "bee", "cow", "dog/left", "dog/right")]
CONTENTS = ("image", "copy", "damaged", "note")


@functools.cache
def noisy_png(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), np.uint8)
    return cv2.imencode(".png", pixels)[1].tobytes()


def write_project(folders: dict[str, list[str]], classes: list[str] | None) -> None:
    """Write the files of `folders` and the class file, and delete what an earlier call left."""
    for name in ("datasets", "model_data", "audit"):
        shutil.rmtree(name, ignore_errors=True)
    for path in Path().glob("cls_*"):
        path.unlink()
    for number, (folder, contents) in enumerate(folders.items()):
        Path("datasets", folder).mkdir(parents=True)
        for i, content in enumerate(contents):
            path = Path("datasets", folder, f"{i}.{'txt' if content == 'note' else 'png'}")
            path.write_bytes({"image": noisy_png(10 * number + i), "copy": noisy_png(999)}.get(content, b"damaged"))
    if classes:
        write_classes("model_data/cls_classes.txt", classes)


@st.composite
def projects(draw) -> dict:
    """What is in each folder, the class file, and the arguments of annotate."""
    contents = st.lists(st.sampled_from(CONTENTS), max_size=6)
    folders = draw(st.dictionaries(st.sampled_from(FOLDERS), contents, max_size=8))
    folders |= {f"train/{name}": [*folders.get(f"train/{name}", ()), *["image"] * 3] for name in ("ant", "bee")}
    classes = draw(st.none() | st.lists(st.sampled_from(["ant", "bee", "cow", "dog", "elk"]), min_size=2, unique=True))
    arguments = {
        "test_fraction": draw(st.sampled_from([0.0, 0.3])),
        "fix": draw(st.booleans()),
        "classes_from": draw(st.sampled_from(["top", "leaf", "path"])),
        "class_file": draw(st.sampled_from(["keep", "add"])),
    }
    return {"folders": folders, "classes": classes, "arguments": arguments}


@pytest.fixture
def fast(monkeypatch) -> None:
    """Nothing is flushed to the disk, and the report isn't written."""
    monkeypatch.setattr("os.fsync", lambda descriptor: None)
    monkeypatch.setattr("utils.annotation.annotate.write_audit", lambda *arguments: None)


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(project=projects())
def test_every_printed_count_is_that_of_the_lists(here, fast, capsys, project):
    write_project(project["folders"], project["classes"])
    capsys.readouterr()
    try:
        annotate(**project["arguments"])
    except ValueError:  # too few images, or test images in a folder and a fraction
        assert not list(here.glob("cls_*.txt"))
        return
    output = re.sub(r" and \d+ more", "", capsys.readouterr().out)
    names = read_classes("model_data/cls_classes.txt")
    lines = {split: entries(f"cls_{split}.txt") if Path(f"cls_{split}.txt").exists() else [] for split in SPLITS}
    counts = {split: Counter(names[int(line.partition(";")[0])] for line in lines[split]) for split in SPLITS}

    rows = {words[0]: words[1:4] for words in map(str.split, output.splitlines()) if len(words) > 3}
    assert all(rows[name] == [str(counts[split][name]) for split in SPLITS] for name in names)
    assert rows["all"] == [str(counts[split].total()) for split in SPLITS]
    held_out = dict(re.findall(r"no (\w+) folder with images: (\d+) image", output))
    for split in ("val", "test"):
        assert counts[split].total() == int(held_out.get(split, 0)) + sum("/train/" not in p for p in lines[split])

    for names_of in re.findall(r"training images of (.*)", output):
        assert all(counts["train"][name] == int(count) for name, count in re.findall(r"(\S+) \((\d+)\)", names_of))
    for largest, most, smallest, least in re.findall(r"(\S+) has (\d+) training images? and (\S+) (\d+);", output):
        assert (counts["train"][largest], counts["train"][smallest]) == (int(most), int(least))
    for split, names_of in re.findall(r"a single (\w+) image of (.*):", output):
        assert {counts[split][name] for name in names_of.split(", ")} == {1}
    for split, names_of in re.findall(r"no (\w+) images of ([^;\n]*)", output):
        assert {counts[split][name] for name in names_of.split(", ")} == {0}

    everywhere = sum(count.total() for count in counts.values())
    excluded = sum(map(int, re.findall(r"(\d+) excluded, see", output)))
    unused = sum(map(int, re.findall(r"warning: (\d+) images? of", output)))
    assert everywhere + excluded + unused == len(list(Path("datasets").rglob("*.png")))
    (written,) = re.findall(r"^written: (.*)", output, re.MULTILINE)
    changed = ["model_data/cls_classes.txt"] * (names != project["classes"])
    assert written.split(", ") == changed + [f"cls_{split}.txt" for split in SPLITS if lines[split]]


def test_project_in_a_folder_of_its_own(two_classes, capsys):
    annotate()
    before = {path: path.read_bytes() for path in Path().rglob("*") if path.is_file() and "cache" not in path.parts}
    touch(*(f"pets/{name}/{i}.jpg" for name in ("cat", "dog") for i in range(6)))
    annotate("pets", out="pets", test_fraction=0.2)
    assert re.search(r"^to train on it: python \S*train\.py --data pets$", capsys.readouterr().out, re.MULTILINE)
    assert {path: path.read_bytes() for path in before} == before
    names = {"cls_train.txt", "cls_val.txt", "cls_test.txt", "cls_classes.txt", "audit", "cat", "dog"}
    assert {path.name for path in Path("pets").iterdir()} == names
    assert Path("pets/audit/audit.html").is_file()
    images = read_list("pets/cls_train.txt", 2)
    assert os.path.isfile(images.path(0))
    assert read_classes("pets/cls_classes.txt") == ["cat", "dog"]
    touch("pets/audit/thumbnail.png")
    first = Path("pets/cls_train.txt").read_bytes()
    annotate("pets", out="pets", test_fraction=0.2)
    assert Path("pets/cls_train.txt").read_bytes() == first
    assert "audit  " not in capsys.readouterr().out.partition("all ")[0]
    annotate(out="new/deep", audit=False)
    assert {path.name for path in Path("new/deep").iterdir()} == names - {"audit", "cat", "dog"}


def test_out_excludes_other_paths(two_classes):
    with pytest.raises(ValueError, match="out='pets': can't be combined with other paths to write to"):
        annotate(out="pets", classes_path="classes.txt")
    with pytest.raises(ValueError, match=r"out='train\.py': it is a file"):
        touch("train.py")
        annotate(out="train.py")


@pytest.mark.parametrize(
    ("options", "path"),
    [
        ({"classes_path": "file/classes.txt"}, "file"),
        ({"train_annotation_path": "folder"}, "folder"),
        ({"audit_path": "file/audit"}, "file/audit"),
    ],
)
def test_what_cannot_be_written_is_named(two_classes, options, path):
    Path("file").touch()
    Path("folder").mkdir()
    with pytest.raises(WriteError, match=f"^{path} can't be written .*, or choose another place$"):
        annotate(**options)


def test_demo_digits_that_cannot_be_written(here, monkeypatch):
    def fail(self, path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", fail)
    with pytest.raises(WriteError, match=r"^demo/train/0/0000\.png can't be written \(No space"):
        ensure_lists(TrainConfig(demo=True))
