"""`eval.py` in parts gives the files of `eval.py` in one, and refuses files that aren't of its parts."""

import os
import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import eval as evaluation
from nets.weights.digest import digest_file
from nets.weights.tree import read_tree, write_tree
from tests.conftest import write_image
from utils.data.image_list import read_list
from utils.evaluation.eval_lists import read_ood_images
from utils.evaluation.output_parts import FILE, IMAGES, OOD, OutputParts
from utils.inference.classifier import load_classifier
from utils.runs.checkpoint import LAST, find_checkpoint
from utils.system.part import Part

OPTIONS = {"num_workers": 0, "batch_size": 2}


@pytest.fixture
def ood(tmp_path) -> str:
    """A folder of five images, of which one is unreadable."""
    for i in range(5):
        write_image(tmp_path / "ood" / f"{i}.png", 50 * i)
    (tmp_path / "ood/2.png").write_bytes(b"damaged")
    return str(tmp_path / "ood")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if not path.name.startswith("outputs-")}


@pytest.mark.parametrize("count", [3, 8])
def test_parts_give_the_same_files_as_one(count, trained, tmp_path, ood, capsys):
    """Also if a part has no images, the parts are in any order, or one is run twice."""
    one, parts = tmp_path / "one", tmp_path / "parts"
    flags = OPTIONS | {"ood": ood, "corrupted": 3}
    evaluation.main(out=str(one), **flags)
    for number in random.Random(count).sample(range(1, count + 1), count):
        evaluation.main(out=str(parts), part=f"{number}/{count}", **flags)
    again = Part(2, count).place(parts / FILE)
    before = again.read_bytes()
    evaluation.main(out=str(parts), part=f"2/{count}", **flags)
    assert again.read_bytes() == before
    assert contents(parts) == {}
    assert "when all are: the same command with --merge" in capsys.readouterr().out
    evaluation.main(out=str(parts), merge=True, **flags)
    assert contents(parts) == contents(one)
    assert "unreadable OOD image skipped" in capsys.readouterr().out


@pytest.fixture
def parts(trained, tmp_path, ood) -> OutputParts:
    """Two parts with their files."""
    checkpoint = find_checkpoint("")
    classifier = load_classifier(checkpoint, "cpu")
    lists = {IMAGES: read_list("cls_test.txt", 2), OOD: read_ood_images(classifier, ood)}
    (tmp_path / "parts").mkdir()
    parts = OutputParts(tmp_path / "parts", digest_file(checkpoint), classifier, lists, batch_size=2)
    for number in (1, 2):
        evaluation.compute_part(parts, Part(number, 2), num_workers=0)
    assert len(parts.read()[IMAGES].logits) == 11
    return parts


def second(parts: OutputParts) -> Path:
    return Part(2, 2).place(parts.folder / FILE)


def test_missing_and_other_parts_are_named(parts):
    second(parts).unlink()
    with pytest.raises(FileNotFoundError, match=r"parts 2/2 of .* are missing; .* --part 2/2$"):
        parts.read()
    Part(1, 3).place(parts.folder / FILE).touch()
    with pytest.raises(ValueError, match="has files of 2 and 3 parts"):
        parts.read()
    for file in parts.folder.iterdir():
        file.unlink()
    with pytest.raises(FileNotFoundError, match="there is no part of"):
        parts.read()


def test_parts_of_something_else_are_refused(parts):
    other_checkpoint = digest_file(find_checkpoint("", LAST))
    for message, changes in (
        ("batch_size", {"batch_size": 4}),
        ("checkpoint", {"checkpoint_sha256": other_checkpoint}),
        ("images", {"lists": parts.lists | {IMAGES: read_list("cls_val.txt", 2)}}),
        ("ood", {"lists": {IMAGES: parts.lists[IMAGES]}}),
    ):
        message = rf"-1-of-2\..* can't be used: it .*{message}.*; run the same command with --part 1/2"
        with pytest.raises(ValueError, match=message):
            replace(parts, **changes).read()


def test_parts_in_different_precisions_are_refused(parts):
    other = replace(parts, classifier=replace(parts.classifier, precision="bf16"))
    other.write(Part(2, 2), {IMAGES: parts.read()[IMAGES]})
    with pytest.raises(ValueError, match=r"-2-of-2\..* can't be used: it was made with another precision; run"):
        parts.read()


def put(*keys: str, to: object) -> Callable[[dict], None]:
    """A change of the value at `keys`; if `to` is a function, it gets the old value."""

    def change(tree: dict) -> None:
        for key in keys[:-1]:
            tree = tree[key]
        tree[keys[-1]] = to(tree[keys[-1]]) if callable(to) else to

    return change


HOSTILE = {
    "no facts": put("facts", to=None),
    "a tensor as a fact": put("facts", "batch_size", to=torch.ones(2)),
    "a bool as a number": put("facts", "batch_size", to=True),
    "another part": put("facts", "part", to="1/2"),
    "no outputs": put("outputs", to=[1, 2]),
    "no list": put("outputs", IMAGES, to=None),
    "text": put("outputs", IMAGES, "logits", to="x"),
    "too few": put("outputs", IMAGES, "logits", to=lambda x: x[1:]),
    "too many classes": put("outputs", IMAGES, "logits", to=lambda x: torch.cat([x, x], dim=1)),
    "fp64": put("outputs", IMAGES, "embeddings", to=lambda x: x.double()),
    "no dimension": put("outputs", IMAGES, "brightness", to=torch.tensor(0.5)),
    "NaN": put("outputs", OOD, "logits", to=lambda x: x * torch.nan),
    "infinite": put("outputs", OOD, "embeddings", to=lambda x: x / 0),
    "too bright": put("outputs", IMAGES, "brightness", to=lambda x: x + 1),
    "indices of fp32": put("outputs", IMAGES, "indices", to=lambda x: x.float()),
    "others' images": put("outputs", IMAGES, "indices", to=lambda x: x - 1),
    "negative": put("outputs", OOD, "indices", to=lambda x: x - 100),
    "twice": put("outputs", OOD, "indices", to=lambda x: x * 0 + x[0]),
    "backwards": put("outputs", IMAGES, "indices", to=lambda x: x.flip(0)),
    "large": put("more", to=torch.zeros(10**6)),
}


def test_hostile_files_are_refused(parts):
    message = r"merge: .*-2-of-2\.\w+ can't be used: it.*; run the same command with --part 2/2"
    content = second(parts).read_bytes()
    for name, change in HOSTILE.items():
        second(parts).write_bytes(content)
        change(tree := read_tree(second(parts)))
        with second(parts).open("w+b") as file:
            write_tree(file, tree, note={})
        with pytest.raises(ValueError, match=message):
            pytest.fail(f"{name}: {parts.read()}")


def test_damaged_files_are_refused(parts):
    content = second(parts).read_bytes()
    rng = random.Random(0)
    for length in (0, 7, 100, len(content) - 1):
        second(parts).write_bytes(content[:length])
        with pytest.raises(ValueError, match=r"-2-of-2\.\w+ can't be used"):
            parts.read()
    for place in rng.sample(range(len(content)), 30):
        changed = bytearray(content)
        changed[place] ^= 1 << rng.randrange(8)
        second(parts).write_bytes(changed)
        with pytest.raises(ValueError, match=r"-2-of-2\.\w+ can't be used"):
            parts.read()
    second(parts).unlink()
    shutil.copy(Part(1, 2).place(parts.folder / FILE), second(parts))
    with pytest.raises(ValueError, match="another part"):
        parts.read()
    second(parts).unlink()
    os.symlink("/dev/zero", second(parts))
    with pytest.raises(FileNotFoundError, match="parts 2/2 of"):
        parts.read()


def test_arguments(trained):
    for options, message in (
        ({"part": "1/2", "merge": True}, "part and merge: choose one"),
        ({"part": "3/2"}, "there is no such part"),
        ({"part": "1/2", "compare": ("logs", "logs")}, "compare can't be combined"),
    ):
        with pytest.raises(ValueError, match=message):
            evaluation.main(**options)
