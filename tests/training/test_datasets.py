"""Tests of utils/training/datasets.py."""

from pathlib import Path

from tests.conftest import settings, touch
from utils.annotation.annotate import annotate
from utils.training.datasets import load_data


def test_classes_without_images_are_reported(here, capsys):
    touch(*(f"datasets/{name}/{i}.jpg" for name in ("cat", "dog") for i in range(4)))
    annotate(audit=False)
    capsys.readouterr()
    load_data(settings())
    assert capsys.readouterr().out == ""
    Path("model_data/cls_classes.txt").write_text("cat\ndog\n" + "".join(f"other {i}\n" for i in range(40)))
    lines = [line for line in Path("cls_val.txt").read_text().splitlines(True) if line.startswith("0;")]
    Path("cls_val.txt").write_text("".join(lines))
    load_data(settings())
    some = "other 0, other 1, other 2, other 3"
    assert capsys.readouterr().out.splitlines() == [
        f"warning: cls_train.txt has no images of {some}, other 4 and 35 more, which can't be learned",
        f"warning: cls_val.txt has no images of dog, {some} and 36 more, which aren't validated",
    ]
