"""Tests of utils/data/image_io.py: any file becomes an image or an ImageError."""

import io
import json
import os
import re
import socket
import struct
import subprocess
import sys
import textwrap
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from tests.conftest import settings
from utils.annotation.fingerprints import Fingerprints
from utils.annotation.folder_scan import find_images
from utils.data import image_io
from utils.data.dataset import FileSource
from utils.data.decode_budget import DecodeBudget, budget
from utils.data.image_io import HAS_HEIF, ImageError, Region, open_image, open_to_decode, read_size, upright_rgb
from utils.data.image_list import list_in_memory
from utils.data.preprocessing import Preprocessing
from utils.inference.classifier import load_classifier
from utils.runs.checkpoint import find_checkpoint


def read_region(path, choose, **limits) -> Region:
    """Decode the crop whose box and target size `choose(width, height)` returns."""
    with open_to_decode(path, **limits) as image:
        box, size = choose(image.width, image.height)
        return image.decode(box, size)


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
        (np.int32([[0, 128 * 257, 65535]]), [0, 128, 255]),
        (np.float32([[0, 0.5, 1.0]]), [0, 128, 255]),
        (np.float32([[np.nan, 0.5, 1.0]]), [0, 128, 255]),
    ],
)
def test_deep_images_are_scaled(here, values, expected):
    for name in ("a.tif", "a.png") if values.dtype == np.uint16 else ("a.tif",):
        Image.fromarray(values).save(name)
        assert np.asarray(open_image(name))[0, :, 0].tolist() == expected


def write_tiff(
    values: np.ndarray,
    photometric: int,
    planar: bool = False,
    extra: tuple[int, ...] = (),
    bits: int = 0,
    colors: tuple[int, ...] = (),
):
    """Write values (height, width, channels) to a.tif, in layouts that Pillow doesn't write."""
    channels = values.shape[2]
    data = (values.transpose(2, 0, 1) if planar else values).tobytes()
    planes = channels if planar else 1
    tags = {256: [values.shape[1]], 257: [len(values)], 258: [bits or 8 * values.itemsize] * channels, 259: [1]}
    tags |= {262: [photometric], 273: [0] * planes, 277: [channels], 279: [len(data) // planes] * planes}
    tags |= {284: [2 if planar else 1]} | ({320: colors} if colors else {}) | ({338: extra} if extra else {})
    tags |= {339: [{"u": 1, "i": 2, "f": 3}[values.dtype.kind]] * channels}
    end = 8 + 2 + 12 * len(tags) + 4  # of the directory; longer values follow, then the pixels
    first = end + sum(4 * len(numbers) for numbers in tags.values() if len(numbers) > 1)
    tags[273] = [first + i * len(data) // planes for i in range(planes)]
    directory, longer = struct.pack("<H", len(tags)), b""
    for tag, numbers in tags.items():
        packed = struct.pack(f"<{len(numbers)}I", *numbers)
        place = packed if len(numbers) == 1 else struct.pack("<I", end + len(longer))
        longer += packed if len(numbers) > 1 else b""
        directory += struct.pack("<HHI", tag, 4, len(numbers)) + place
    Path("a.tif").write_bytes(b"II*\0\x08\0\0\0" + directory + bytes(4) + longer + data)


GRAY = np.uint16([[[0], [128 * 257], [65535]]])
RGB = np.concatenate([GRAY, 0 * GRAY, 65535 - GRAY], axis=2)
RGBN = np.concatenate([RGB, 65535 - GRAY], axis=2)


@pytest.mark.parametrize(
    ("values", "layout", "expected"),
    [
        (GRAY, {"photometric": 0}, [255, 127, 0]),
        ((GRAY // 2).astype(np.int16), {"photometric": 1}, [0, 128, 255]),
        (GRAY.astype(np.uint32), {"photometric": 1}, [0, 128, 255]),
        (RGB, {"photometric": 2}, [[0, 0, 255], [128, 0, 127], [255, 0, 0]]),
        (RGBN, {"photometric": 2}, [[0, 0, 255], [128, 0, 127], [255, 0, 0]]),
        (RGBN, {"photometric": 2, "extra": (2,)}, [[0, 0, 255], [192, 128, 191], [255, 255, 255]]),
        ((RGBN >> 8).astype(np.uint8), {"photometric": 2}, [[0, 0, 255], [128, 0, 127], [255, 0, 0]]),
        ((RGB >> 8).astype(np.uint8), {"photometric": 2, "planar": True}, [[0, 0, 255], [128, 0, 127], [255, 0, 0]]),
    ],
)
def test_layouts_of_tiff(here, values, layout, expected):
    """White-is-zero, signed, undeclared fourth channels (near infrared) and alpha, separate planes."""
    write_tiff(values, **layout)
    pixels = np.asarray(open_image("a.tif"))[0]
    assert (pixels if isinstance(expected[0], list) else pixels[:, 0]).tolist() == expected
    assert np.asarray(upright_rgb(Image.open("a.tif")))[0].tolist() == pixels.tolist()


def test_twelve_bits(here):
    write_tiff(np.uint8([[[0xFF], [0xF0], [0x00]]]), photometric=1, bits=12)
    width = [struct.pack("<HHII", 256, 4, 1, number) for number in (3, 2)]  # two pixels in three bytes
    (here / "a.tif").write_bytes((here / "a.tif").read_bytes().replace(*width))
    assert np.asarray(open_image("a.tif"))[0, :, 0].tolist() == [255, 0]


@pytest.mark.parametrize(
    ("values", "layout", "cause"),
    [
        (
            np.float32([[[0], [1000], [4095]]]),
            {},
            r"values go from 0 to 4095.*with values from 0 \(black\) to 1 \(white\)",
        ),
        (np.float32([[[0], [np.inf]]]), {}, "values go from 0 to inf"),
        (np.float32([[[-0.5], [0.5]]]), {}, "values go from -0.5 to 0.5"),
        (np.int16([[[-5], [5]]]), {}, r"values go from -5 to 5.*32767 \(white\)"),
        (np.int32([[[-5], [70_000]]]), {}, r"values go from -5 to 70000.*65535 \(white\)"),
        (np.uint32([[[0], [2**32 - 1]]]), {}, r"values go from 0 to 4.29497e\+09"),
        (np.int8([[[0], [5]]]), {}, "8-bit integers are signed"),
        (np.float64([[[0], [1]]]), {}, "a TIFF of 1 channel of 64-bit floats isn't supported; save it as 8-bit RGB"),
        (np.float32(RGB), {"photometric": 2}, "3 channels of 32-bit floats"),
        (RGB, {"photometric": 2, "planar": True}, "separate planes of 16 bits"),
        (np.uint8(np.ones((1, 1, 7))), {"photometric": 2, "extra": (0,) * 4}, "7 channels of 8-bit unsigned integers"),
    ],
)
def test_images_without_a_known_white_are_refused(here, values, layout, cause):
    write_tiff(values, **{"photometric": 1} | layout)
    with pytest.raises(ImageError, match=cause):
        open_image("a.tif")
    with pytest.raises(ImageError, match=cause), open_to_decode("a.tif"):
        pass


def test_audit_training_and_export_share_the_rule(here):
    Image.fromarray(np.float32([[0, 1000, 4095]])).save("a.tif")
    assert "go from 0 to 4095" in Fingerprints("prints").read(["a.tif"])[0].error
    files = FileSource(list_in_memory([(0, "a.tif")]), Preprocessing.from_config(settings()))
    with pytest.raises(ImageError, match="go from 0 to 4095"), files.open(0):
        pass
    with pytest.raises(ImageError, match="go from 0 to 4095"):
        upright_rgb(Image.open("a.tif"))


def test_alpha_that_is_0_everywhere_is_ignored(here):
    Image.new("RGBA", (2, 1), (10, 20, 30, 0)).save("a.png")
    assert open_image("a.png").getpixel((0, 0)) == (10, 20, 30)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparent_images_get_a_white_background(here, mode):
    image = Image.new("RGBA", (2, 1), (0, 0, 0, 0))
    image.putpixel((1, 0), (0, 0, 0, 255))
    image.convert(mode).save("a.png")
    assert np.asarray(open_image("a.png"))[0].tolist() == [[255, 255, 255], [0, 0, 0]]


def test_suffix_is_ignored(here):
    Image.new("P", (3, 2)).save("gif.jpg", "GIF")
    Image.new("RGB", (3, 2), "red").save("png.bin", "PNG")
    assert open_image("gif.jpg").size == (3, 2)
    assert open_image("png.bin").getpixel((0, 0)) == (255, 0, 0)


@pytest.mark.parametrize("kind", ["gif", "webp", "png", "tiff"])
def test_first_frame_of_animations(here, kind):
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
    frames[0].save(f"a.{kind}", save_all=True, append_images=frames[1:])
    red, _, blue = open_image(f"a.{kind}").getpixel((0, 0))
    assert (red > 240, blue < 15) == (True, True)


@pytest.mark.parametrize("mode", ["CMYK", "L", "RGB"])
def test_jpeg_color_modes(here, mode):
    Image.new("RGB", (16, 16), (200, 200, 200)).convert(mode).save("a.jpg")
    np.testing.assert_allclose(open_image("a.jpg").getpixel((5, 5)), (200, 200, 200), atol=3)


def test_all_exif_orientations_give_the_same_image(shared):
    for kind, upright in (("Landscape", (1800, 1200)), ("Portrait", (1200, 1800))):
        images = [open_image(shared / "data" / "exif_orientation" / f"{kind}_{i}.jpg") for i in range(9)]
        assert {image.size for image in images} == {upright}
        pixels = [np.asarray(image.resize((30, 30))).astype(int) for image in images]
        # Compressed separately, the files differ a little; a wrong orientation differs by far more.
        assert max(np.abs(p - pixels[1]).mean() for p in pixels) < 5
        assert np.abs(pixels[1][::-1] - pixels[1]).mean() > 15


def test_exif_orientation_does_not_change_predictions(shared, trained):
    classifier = load_classifier(find_checkpoint(""))
    for kind in ("Landscape", "Portrait"):
        paths = [str(shared / "data" / "exif_orientation" / f"{kind}_{i}.jpg") for i in range(9)]
        probabilities = classifier.probabilities(torch.stack([classifier.load(path) for path in paths]))
        assert len(probabilities.argmax(1).unique()) == 1
        assert (probabilities - probabilities[1]).abs().max() < 0.02


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["jpg", "png", "tif", "webp"])
def test_crop_boxes_refer_to_the_upright_image(here, orientation, suffix):
    exif = Image.Exif()
    exif[0x0112] = orientation
    levels = np.random.default_rng(0).integers(0, 256, (6, 10, 3), dtype=np.uint8)
    smooth = Image.fromarray(levels).resize((1000, 600), Image.Resampling.BICUBIC)
    smooth.save(f"a.{suffix}", exif=exif, quality=95)
    upright = open_image(f"a.{suffix}")
    sizes = []

    def choose(width, height):
        sizes.append((width, height))
        return 0.1 * width, 0.4 * height, 0.6 * width, 0.8 * height

    for size in ((200, 200), (100, 50), (20, 30)):
        region = read_region(f"a.{suffix}", lambda w, h, size=size: (choose(w, h), size))
        assert sizes.pop() == upright.size
        own = Image.fromarray(region.pixels).resize(size[::-1], Image.Resampling.BILINEAR, box=region.box)
        plain = upright.resize(size[::-1], Image.Resampling.BILINEAR, box=choose(*upright.size))
        assert np.abs(np.asarray(own).astype(int) - np.asarray(plain)).mean() < 2


def test_jpeg_is_decoded_at_the_lowest_sufficient_scale(here):
    Image.new("RGB", (1600, 800)).save("a.jpg")

    def pixels(fraction, size):
        region = read_region("a.jpg", lambda w, h: ((0, 0, w * fraction, h * fraction), (size, size)))
        assert min(region.box[2] - region.box[0], region.box[3] - region.box[1]) >= 1.5 * size
        return region.pixels.shape[:2]

    assert pixels(1, 267) == (800, 1600)
    assert pixels(1, 266) == (400, 800)
    assert pixels(1, 60) == (100, 200)
    assert pixels(0.5, 60) == (200, 400)


def test_open_to_decode_agrees_with_open_image(shared):
    """On difficult files, including errors."""
    agreed = 0
    for path in sorted((shared / "data" / "difficult_images").rglob("*")):
        if not path.is_file():
            continue
        try:
            whole = np.asarray(open_image(path, max_pixels=2**22))
        except ImageError as error:
            with pytest.raises(ImageError, match=re.escape(error.cause[:20])):
                read_region(path, lambda w, h: ((0, 0, w, h), (h, w)), max_pixels=2**22)
            continue
        region = read_region(path, lambda w, h: ((0, 0, w, h), (h, w)), max_pixels=2**22)
        assert np.abs(whole.astype(int) - region.pixels).max() <= 3, path  # builds of libjpeg round differently
        assert region.box == (0, 0, whole.shape[1], whole.shape[0])
        agreed += 1
    assert agreed > 400


@pytest.mark.parametrize("reader", [open_image, read_size])
def test_unreadable_files_raise_an_error_with_their_path(here, reader):
    (here / "text.jpg").write_text("no image")
    (here / "folder.jpg").mkdir()
    for name in ("text.jpg", "folder.jpg", "none.jpg"):
        with pytest.raises(ImageError, match=f"{name} can't be read as an image"):
            reader(name)


def test_error_has_path_and_cause(here):
    (here / "a.jpg").write_bytes(b"")
    with pytest.raises(ImageError) as error:
        open_image("a.jpg")
    assert (error.value.path, error.value.cause) == ("a.jpg", "it is empty")


@pytest.mark.skipif(HAS_HEIF, reason="pillow-heif is installed")
def test_heic_error_suggests_pillow_heif(here):
    (here / "a.jpg").write_bytes(b"\0\0\0\x18ftypheic" + bytes(100))
    with pytest.raises(ImageError, match="it is HEIC; pip install pillow-heif"):
        open_image("a.jpg")


@pytest.mark.parametrize("suffix", ["png", "gif", "webp", "avif", "heic"])
def test_files_whose_headers_are_incomplete(here, suffix, monkeypatch):
    monkeypatch.setattr(image_io, "HAS_HEIF", True)
    if suffix == "heic":
        (here / "a.heic").write_bytes(b"\0\0\0\x18ftypheic" + bytes(100))
    else:
        Image.new("RGB", (64, 64)).save(f"a.{suffix}")
    (here / "b").write_bytes((here / f"a.{suffix}").read_bytes()[:12])
    with pytest.raises(
        ImageError, match=r"b can't be read as an image: it is a .* file, incomplete or damaged; replace"
    ):
        open_image("b")


def jpeg_2000(definition: list[tuple[int, int, int]], space: int) -> bytes:
    """A JPEG 2000 file in pure red, with other channel definitions and color space."""
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(buffer, "JPEG2000")
    data = buffer.getvalue()
    header = data.index(b"jp2h") - 4
    end = header + int.from_bytes(data[header : header + 4], "big")
    content = data[header + 8 : end]
    place = content.index(b"colr") + 7
    content = content[:place] + struct.pack(">I", space) + content[place + 4 :]
    if definition:
        packed = struct.pack(">H", len(definition)) + b"".join(struct.pack(">HHH", *row) for row in definition)
        content += struct.pack(">I4s", 8 + len(packed), b"cdef") + packed
    return data[:header] + struct.pack(">I4s", 8 + len(content), b"jp2h") + content + data[end:]


@pytest.mark.parametrize(
    ("definition", "space", "cause"),
    [
        ([], 16, ""),
        ([(0, 0, 1), (1, 0, 2), (2, 0, 3)], 16, ""),
        ([(0, 0, 3), (1, 0, 2), (2, 0, 1)], 16, "channels in another order than RGB"),
        ([], 14, "color space 14"),
    ],
)
def test_colors_of_jpeg_2000(here, definition, space, cause):
    (here / "a.jp2").write_bytes(jpeg_2000(definition, space))
    for read in (open_image, lambda path: upright_rgb(Image.open(path))):
        if cause:
            with pytest.raises(ImageError, match=cause):
                read("a.jp2")
        else:
            assert read("a.jp2").getpixel((3, 3)) == (254, 0, 0) or read("a.jp2").getpixel((3, 3)) == (255, 0, 0)


@pytest.mark.parametrize("scale", [1, 257])
def test_palettes_of_tiff_of_8_and_16_bits(here, scale):
    colors = np.zeros((3, 256), int)
    colors[:, :3] = [[200, 0, 10], [0, 100, 20], [0, 0, 30]]
    write_tiff(np.uint8([[[0], [1], [2]]]), photometric=3, colors=(colors * scale).flatten().tolist())
    for image in (open_image("a.tif"), upright_rgb(Image.open("a.tif"))):
        assert np.asarray(image)[0].tolist() == [[200, 0, 0], [0, 100, 0], [10, 20, 30]]


def test_image_without_its_palette(shared):
    path = shared / "data/hostile_files/wrong_colours/missing_plte.png"
    for read in (open_image, lambda path: upright_rgb(Image.open(path))):
        with pytest.raises(ImageError, match="its palette is missing"):
            read(path)


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
def test_broken_exif_is_ignored(here, suffix):
    exif = b"Exif\0\0" + b"no TIFF header at all" + bytes(20)
    Image.new("RGB", (40, 20), "red").save(f"a.{suffix}", exif=exif, dpi=(72, 72))
    assert open_image(f"a.{suffix}").size == (40, 20)
    region = read_region(f"a.{suffix}", lambda width, height: ((0, 0, width, height), (20, 40)))
    assert region.pixels.shape == (20, 40, 3)


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_exif_tag_of_an_unusual_type(here, suffix, mode):
    """ResolutionUnit as text: Pillow's exif_transpose rewrites it and fails."""
    entries = struct.pack("<HHIHH", 0x0112, 3, 1, 6, 0) + struct.pack("<HHI4s", 0x0128, 2, 4, b"in.")
    exif = b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", 2) + entries + bytes(4)
    sideways = np.zeros((10, 20), np.uint8)
    sideways[:, :10] = 255  # left half white: upright it is the top half
    Image.fromarray(sideways).convert(mode).save(f"a.{suffix}", exif=exif)
    image = open_image(f"a.{suffix}")
    for upright in (np.asarray(image), np.asarray(upright_rgb(image))):  # rotated once, not twice
        assert upright.shape == (20, 10, 3)
        assert upright[:8].min() > 200
        assert upright[12:].max() < 50


def test_max_pixels(here):
    Image.new("L", (100, 50)).save("a.png")
    for limit in (4999, 100):  # Pillow raises its own error at twice the limit
        with pytest.raises(ImageError, match=rf"more pixels than max_pixels={limit} allows; shrink it"):
            open_image("a.png", max_pixels=limit)
    assert open_image("a.png", max_pixels=5000).size == (100, 50)


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_large_jpeg_is_decoded_at_a_lower_scale(here, mode):
    """As phone photos of 200 megapixels are."""
    smooth = Image.radial_gradient("L").resize((400, 200)).convert(mode)
    smooth.save("a.jpg", quality=95)
    limits = {"max_pixels": 5000}
    assert read_size("a.jpg", **limits) == (400, 200)
    image = open_image("a.jpg", **limits)
    assert image.size == (100, 50)
    whole = np.asarray(open_image("a.jpg").resize(image.size, Image.Resampling.BOX))
    assert np.abs(np.asarray(image).astype(int) - whole).mean() < 2
    region = read_region("a.jpg", lambda w, h: ((0, 0, w / 2, h), (200, 200)), **limits)
    assert region.pixels.shape == (50, 100, 3)
    assert region.box == (0, 0, 50, 50)


def test_jpeg_that_takes_its_memory_at_any_scale_is_refused(here):
    """Progressive ones, those of several scans, and those that are too large at 1/8."""
    image = Image.new("RGB", (400, 200))
    image.save("progressive.jpg", progressive=True)
    image.save("a.jpg")
    header = b"\xff\xda\x00\x0c"
    content = (here / "a.jpg").read_bytes()
    (here / "scans.jpg").write_bytes(content.replace(header + b"\x03", header + b"\x01"))
    assert open_image("a.jpg", max_pixels=1250).size == (50, 25)
    for name, limit in (("progressive.jpg", 79_999), ("scans.jpg", 79_999), ("a.jpg", 1249)):
        with pytest.raises(ImageError, match=f"more pixels than max_pixels={limit} allows"):
            open_image(name, max_pixels=limit)
    assert open_image("progressive.jpg", max_pixels=80_000).size == (400, 200)


def test_pipes_and_folders_do_not_block(here):
    os.mkfifo("pipe.jpg")
    os.mkdir("folder.jpg")
    os.symlink("loop.jpg", "loop.jpg")
    os.symlink("none", "broken.jpg")
    server = socket.socket(socket.AF_UNIX)
    server.bind("socket.jpg")
    for name in os.listdir():
        with pytest.raises(ImageError, match=name):
            open_image(name)
    skipped = Counter()
    assert find_images(here, skipped) == []
    assert skipped == {"not a file (a broken link, a pipe)": 4}
    server.close()


READ_ALL = """
    import json, os, sys, time
    from utils.data.image_io import ImageError, open_image
    counts, slowest = {"read": 0, "refused": 0}, 0
    for where, _, names in os.walk(sys.argv[1]):
        for name in sorted(names):
            started = time.perf_counter()
            try:
                assert open_image(os.path.join(where, name)).mode == "RGB"
                counts["read"] += 1
            except ImageError:
                counts["refused"] += 1
            slowest = max(slowest, time.perf_counter() - started)
    peak = next(int(line.split()[1]) / 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))
    print(json.dumps(counts | {"slowest_s": slowest, "peak_mb": peak}))
"""


def read_all(folder: Path) -> dict:
    """Read every file below `folder` in a new process; return counts, slowest time and peak memory."""
    if not Path("/proc/self/status").exists():
        pytest.skip("peak memory is read from /proc")
    root = Path(__file__).resolve().parents[2]
    command = [sys.executable, "-c", textwrap.dedent(READ_ALL), folder]
    result = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=120, check=True)
    return json.loads(result.stdout)


def test_difficult_files(shared):
    """Files that made decoders crash, hang or use all memory raise only an ImageError."""
    result = read_all(shared / "data" / "difficult_images")
    assert result["read"] > 500
    assert result["refused"] > 100
    assert result["slowest_s"] < 10
    assert result["peak_mb"] < 300


def test_image_that_claims_to_be_huge_takes_no_memory(here):
    Image.new("1", (13_300, 13_300)).save("a.png")
    Image.new("L", (8, 13_300)).save("a.jpg", progressive=True)
    header = struct.pack(">HH", 13_300, 8)  # height and width
    (here / "a.jpg").write_bytes((here / "a.jpg").read_bytes().replace(header, struct.pack(">HH", 65_500, 65_500)))
    result = read_all(here)
    assert result["refused"] == 2
    assert result["peak_mb"] < 300


@given(data=st.data(), kind=st.sampled_from(["png", "jpeg", "gif", "bmp", "tiff", "webp", "ppm"]))
def test_damaged_files_raise_only_image_errors(tmp_path_factory, data, kind):
    path = tmp_path_factory.getbasetemp() / "damaged"
    noise = np.random.default_rng(0).integers(0, 256, (20, 20, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path, kind)
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 8))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    try:
        assert open_image(path, max_pixels=10**6).mode == "RGB"
    except ImageError as error:
        assert error.path == str(path)


def test_truncated_files(here):
    Image.effect_noise((64, 64), 50).convert("RGB").save("whole.jpg")
    (here / "half.jpg").write_bytes((here / "whole.jpg").read_bytes()[:1500])
    assert read_size("half.jpg") == (64, 64)
    with pytest.raises(ImageError, match=r"half\.jpg.*truncated"):
        open_image("half.jpg")
    with pytest.raises(ImageError, match=r"half\.jpg.*truncated"):
        read_region("half.jpg", lambda w, h: ((0, 0, w, h), (8, 8)))
    assert open_image("half.jpg", allow_truncated=True).size == (64, 64)
    with pytest.raises(ImageError, match=r"half\.jpg.*truncated"):
        open_image("half.jpg")


def test_read_size(here):
    Image.new("RGB", (7, 3)).save("a.png")
    assert read_size("a.png") == (7, 3)


def opened(path: str) -> list[Image.Image]:
    """An image as Pillow opens it, from its file and from memory."""
    return [Image.open(path), Image.open(io.BytesIO(Path(path).read_bytes()))]


@pytest.mark.parametrize("kind", ["cut", "cut, end added", "zeros"])
def test_damage_is_seen_in_opened_images(here, kind):
    buffer = io.BytesIO()
    Image.effect_noise((200, 150), 60).convert("RGB").save(buffer, "JPEG")
    data, middle = buffer.getvalue(), len(buffer.getvalue()) // 2
    damaged = {
        "cut": data[:middle],
        "cut, end added": data[:middle] + b"\xff\xd9",
        "zeros": data[:middle] + bytes(2000) + data[middle + 2000 :],
    }[kind]
    Path("whole.jpg").write_bytes(data)
    Path("damaged.jpg").write_bytes(damaged)
    for image, whole in zip(opened("damaged.jpg"), opened("whole.jpg"), strict=True):
        with pytest.raises(ImageError, match=r"it is damaged \(.*set allow_truncated"):
            upright_rgb(image)
        assert upright_rgb(image, allow_truncated=True).size == (200, 150)
        assert np.array_equal(np.asarray(upright_rgb(whole)), np.asarray(open_image("whole.jpg")))


@pytest.mark.parametrize("suffix", ["png", "gif", "tif"])
def test_opened_images_that_are_cut(here, suffix):
    Image.effect_noise((200, 150), 60).save(f"a.{suffix}")
    os.truncate(f"a.{suffix}", os.path.getsize(f"a.{suffix}") * 3 // 4)
    for image in opened(f"a.{suffix}"):
        with pytest.raises(ImageError, match="can't be read as an image: "):
            upright_rgb(image)


def test_opened_images_have_limits(here, monkeypatch):
    Image.new("RGB", (100, 75)).save("a.jpg")
    Image.new("RGB", (100, 75)).save("a.jp2")
    taken = []
    monkeypatch.setattr(image_io, "budget", DecodeBudget(10**9))
    monkeypatch.setattr(image_io.budget, "take", lambda amount: taken.append(amount) or budget.take(amount))
    for name, most, cause in (
        ("a.jpg", 7499, "100 x 75 pixels, more than max_pixels=7499 allows"),
        ("a.jp2", 9999, "take .* to decode, more than max_pixels=9999"),
    ):
        for image in opened(name):
            with pytest.raises(ImageError, match=cause):
                upright_rgb(image, max_pixels=most)
            assert not taken
            assert upright_rgb(image, max_pixels=most + 1).size == (100, 75)
            assert taken.pop() >= 100 * 75 * 15
    image = Image.new("RGB", (100, 75))
    assert upright_rgb(image, max_pixels=1) is not image  # in memory already
    with Image.open("a.jpg") as image:
        pass
    with pytest.raises(ImageError, match=r"a\.jpg .* its file was closed before it was read; give its path"):
        upright_rgb(image)


def test_what_was_done_with_an_opened_image_counts(here):
    """Its frame and its size are those that the user chose."""
    frames = [Image.new("RGB", (64, 48), color) for color in ("red", "lime")]
    for name in ("a.gif", "a.mpo"):
        frames[0].save(name, save_all=True, append_images=frames[1:])
        with Image.open(name) as image:
            image.seek(1)
            assert upright_rgb(image).getpixel((9, 9))[1] > 200
    with Image.open("a.mpo") as image:
        assert upright_rgb(image).getpixel((9, 9))[0] > 200
    frames[0].save("a.jpg")
    with Image.open("a.jpg") as image:
        image.draft("L", (32, 24))
        upright = upright_rgb(image)
        assert (upright.size, upright.mode) == ((32, 24), "RGB")
        assert len(set(upright.getpixel((9, 9)))) == 1
