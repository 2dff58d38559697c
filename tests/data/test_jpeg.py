"""Tests of utils/data/jpeg.py: damage is seen, harmless oddities aren't damage."""

import io

import numpy as np
import pytest
from PIL import Image

from utils.data.image_io import ImageError, open_image
from utils.data.jpeg import DamagedJpeg, decode_jpeg, find_scans


def encode(mode: str = "RGB", **options) -> bytes:
    buffer = io.BytesIO()
    noise = np.random.default_rng(0).normal(128, 50, (48, 64)).clip(0, 255)  # of some, damage happens to be valid data
    Image.fromarray(noise.astype(np.uint8)).convert(mode).save(buffer, "JPEG", **options)
    return buffer.getvalue()


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"restart_marker_blocks": 2}])
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_missing_and_superfluous_data_are_damage(mode, options):
    data = encode(mode, **options)
    if mode == "CMYK":
        assert decode_jpeg(data, (64, 48), 1) is None  # left to Pillow
    else:
        expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
        assert np.abs(decode_jpeg(data, (64, 48), 1).astype(int) - expected).max() <= 3
        assert decode_jpeg(data, (64, 48), 4).shape == (12, 16, 3)
    middle = next(find_scans(data)) + 16
    for damaged in (data[:-200] + data[-2:], data[:middle] + data[middle - 12 :], data[:-200]):
        with pytest.raises(DamagedJpeg):
            decode_jpeg(damaged, (64, 48), 1)


def test_bytes_between_headers_and_after_the_end_are_harmless(here):
    data = encode()
    (here / "a.jpg").write_bytes(data[:20] + b"\0\0\0\0" + data[20:])
    (here / "b.jpg").write_bytes(data + b"a video" * 1000)
    for name in ("a.jpg", "b.jpg"):
        assert np.abs(np.asarray(open_image(name)).astype(int) - Image.open(io.BytesIO(data))).max() <= 3


def test_allow_truncated_reads_damaged_files(here):
    (here / "a.jpg").write_bytes(encode()[:-500] + b"\xff\xd9")
    with pytest.raises(ImageError, match=r"a\.jpg .* it is damaged \(Corrupt JPEG data.*set allow_truncated"):
        open_image("a.jpg")
    assert open_image("a.jpg", allow_truncated=True).size == (64, 48)


def test_scans_of_thumbnails_and_later_images_do_not_count():
    data = encode(progressive=True)
    thumbnail = b"\xff\xe1" + (len(data) + 2).to_bytes(2, "big") + data
    scans = len(list(find_scans(data)))
    assert scans > 3
    assert len(list(find_scans(data[:2] + thumbnail + data[2:] + data))) == scans
