"""utils/images.py and the picture's way through the transforms."""

import numpy as np
import pytest
from PIL import Image

from utils.images import ImageError, open_image, read_size


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK"])
def test_every_mode_becomes_rgb(here, mode):
    Image.fromarray(np.repeat(np.uint8([[0, 255]]), 4, axis=0)).convert(mode).save("a.tif")
    image = open_image("a.tif")
    assert (image.mode, image.size) == ("RGB", (2, 4))
    assert np.asarray(image)[0].tolist() == [[0, 0, 0], [255, 255, 255]]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (np.uint16([[0, 128 * 257, 65535]]), [0, 128, 255]),
        (np.int32([[-5, 128 * 257, 70000]]), [0, 128, 255]),
        (np.float32([[0, 0.5, 1.0]]), [0, 128, 255]),
        (np.float32([[0, 128.0, 255.0]]), [0, 128, 255]),
        (np.float32([[np.nan, 0.5, -1.0]]), [0, 128, 0]),
    ],
)
def test_deep_pictures_are_scaled(here, values, expected):
    Image.fromarray(values).save("a.tif")
    assert np.asarray(open_image("a.tif"))[0, :, 0].tolist() == expected


def test_a_deep_png_is_scaled(here):
    Image.fromarray(np.uint16([[0, 128 * 257, 65535]])).save("a.png")
    assert np.asarray(open_image("a.png"))[0, :, 0].tolist() == [0, 128, 255]


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparent_pictures_lie_on_white(here, mode):
    image = Image.new("RGBA", (2, 1), (0, 0, 0, 0))
    image.putpixel((1, 0), (0, 0, 0, 255))
    image.convert(mode).save("a.png")
    assert np.asarray(open_image("a.png"))[0].tolist() == [[255, 255, 255], [0, 0, 0]]


def test_all_exif_orientations_give_one_picture(shared):
    for kind, upright in (("Landscape", (1800, 1200)), ("Portrait", (1200, 1800))):
        pictures = [open_image(shared / "data" / "exif_orientation" / f"{kind}_{i}.jpg") for i in range(9)]
        assert {picture.size for picture in pictures} == {upright}
        pixels = [np.asarray(picture.resize((30, 30))).astype(int) for picture in pictures]
        # The files were compressed one by one, so they are alike, not equal; a picture on its side is off by far more.
        assert max(np.abs(p - pixels[1]).mean() for p in pixels) < 5
        assert np.abs(pixels[1][::-1] - pixels[1]).mean() > 15


def test_orientation_made_here(here):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    sideways = np.zeros((10, 20, 3), np.uint8)
    sideways[:, :10] = 255  # left half white: upright it is the top half
    Image.fromarray(sideways).save("a.png", exif=exif)
    upright = np.asarray(open_image("a.png"))
    assert upright.shape == (20, 10, 3)
    assert upright[:10].min() == 255
    assert upright[10:].max() == 0


@pytest.mark.parametrize("reader", [open_image, read_size])
def test_unreadable_files_are_named(here, reader):
    (here / "text.jpg").write_text("no picture")
    (here / "folder.jpg").mkdir()
    for name in ("text.jpg", "folder.jpg", "none.jpg"):
        with pytest.raises(ImageError, match=f"{name} can't be read as a picture"):
            reader(name)


def test_half_a_file_is_an_error(here):
    Image.effect_noise((64, 64), 50).save("whole.jpg")
    (here / "half.jpg").write_bytes((here / "whole.jpg").read_bytes()[:1500])
    assert read_size("half.jpg") == (64, 64)
    with pytest.raises(ImageError, match=r"half\.jpg.*truncated"):
        open_image("half.jpg")


def test_size(here):
    Image.new("RGB", (7, 3)).save("a.png")
    assert read_size("a.png") == (7, 3)
