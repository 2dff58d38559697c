"""Tests of what predict.py writes: one image that can't be written never ends the others."""

import errno
import os
import shutil
from pathlib import Path

import pytest
from PIL import Image

import predict
from utils.data.image_io import ImageError
from utils.inference import save_predictions

DARK, LIGHT = "datasets/test/dark/00.png", "datasets/test/light/00.png"


def test_long_names_are_shortened(trained, tmp_path):
    name = f"{'猫' * 83}a.png"  # 254 bytes
    for i, source in enumerate((DARK, "datasets/test/dark/01.png")):
        (tmp_path / "in" / str(i)).mkdir(parents=True)
        shutil.copy(source, tmp_path / "in" / str(i) / name)
    assert predict.main((str(tmp_path / "in"),), save=str(tmp_path / "s"), sort_into=str(tmp_path / "c")) == 0
    for folder in (tmp_path / "s", tmp_path / "c" / "dark"):
        assert sorted(path.name for path in folder.iterdir()) == [f"{'猫' * 83}_2.png", name]
    assert {path.read_bytes() for path in (tmp_path / "c" / "dark").iterdir()} == {
        path.read_bytes() for path in (tmp_path / "in").rglob("*.png")
    }


def test_an_image_that_can_be_predicted_but_not_saved(trained, tmp_path, monkeypatch, capsys):
    open_image = save_predictions.open_image

    def refuse(path, *limits):
        if path == DARK:
            raise ImageError.of(path, "its last rows are damaged")
        return open_image(path, *limits)

    monkeypatch.setattr(save_predictions, "open_image", refuse)
    assert predict.main((DARK, LIGHT), save=str(tmp_path / "s"), sort_into=str(tmp_path / "c")) == 1
    output = capsys.readouterr()
    assert output.out.count("\n") == 2
    assert f"error: {DARK} isn't written to {tmp_path}/s/: " in output.err and "last rows are damaged" in output.err
    assert f"written to {tmp_path}/s: 1 image\nwritten to {tmp_path}/c: 2 images\n" in output.err


def test_a_full_disk_leaves_no_partial_file(trained, tmp_path, monkeypatch, capsys):
    def fill(source, file, *_):
        file.write(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", fill)
    monkeypatch.setattr(save_predictions.shutil, "copyfileobj", fill)
    assert predict.main((DARK, LIGHT), save=str(tmp_path / "s"), sort_into=str(tmp_path / "c")) == 1
    output = capsys.readouterr()
    assert output.out.count("\n") == 2
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
    message = f"{tmp_path}/s/00.png can't be written (No space left on device); free some space, or"
    assert output.err.count(message) == 2
    assert output.err.count("/00.png can't be written (No space left on device)") == 4


@pytest.mark.parametrize("option", ["save", "sort_into"])
def test_an_unwritable_folder_is_reported_before_any_image(trained, tmp_path, monkeypatch, capsys, option):
    (tmp_path / "file").touch()
    with pytest.raises(
        OSError, match=f"nothing can be written to .*file/out.*another with --{option.replace('_', '-')}"
    ):
        predict.main((DARK,), **{option: str(tmp_path / "file" / "out")})
    assert capsys.readouterr().out == ""


def test_a_copy_with_the_same_content_is_not_repeated(here):
    Path("a.png").write_bytes(b"1")
    for _ in range(2):
        assert save_predictions.copy_into("a.png", here / "out") == here / "out" / "a.png"
    assert os.listdir("out") == ["a.png"]
