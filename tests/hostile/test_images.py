"""Images that hurt, at the doors through which image files are read: damage is seen, and time and memory are bounded.

The long form has 2,000 damaged photos: `python -m pytest -m slow tests/hostile/test_images.py`.
"""

import io
import json
import os
import random
import re
import subprocess
import sys
import textwrap
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
from PIL import Image

from tests.conftest import settings
from utils.annotation.fingerprints import take_fingerprint
from utils.data.dataset import FileSource
from utils.data.image_io import ImageError, open_image
from utils.data.image_list import list_in_memory
from utils.data.jpeg import MARKER, MAX_SCANS, find_scans
from utils.data.preprocessing import Preprocessing
from utils.data.transforms import EvalTransform
from utils.inference.predictor import read_region

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 5
"""Time limit of a file; most take hundredths."""


def open_everywhere(path: str) -> list[str]:
    """The errors at the doors of the loader, the prediction, also of an image that Pillow has opened, and the audit; ""
    where the image was read."""
    preprocessing = Preprocessing.from_config(settings())
    transform = EvalTransform(preprocessing)

    def load() -> None:
        with FileSource(list_in_memory([(0, path)]), preprocessing).open(0) as image:
            transform.region(image)

    def read_opened() -> None:
        with Image.open(path) as image:
            read_region(image, preprocessing, transform)

    errors = []
    for door in (
        load,
        lambda: read_region(path, preprocessing, transform),
        read_opened,
        lambda: take_fingerprint(path),
    ):
        started = time.monotonic()
        try:
            door()
            errors.append("")
        except ImageError as error:
            errors.append(error.cause)
        assert time.monotonic() - started < SECONDS
    return errors


def longest_scan(data: bytes) -> tuple[int, int]:
    """Start and end of the longest entropy-coded segment."""
    segments = [(start, MARKER.search(data, start)) for start in find_scans(data)]
    return max(((start, end.start()) for start, end in segments), key=lambda segment: segment[1] - segment[0])


def remove_restarts(data: bytes, rng: random.Random) -> tuple[bytes, bytes]:
    """The photo with restart markers, and without a third of them."""
    buffer = io.BytesIO()
    Image.open(io.BytesIO(data)).convert("RGB").save(buffer, "JPEG", restart_marker_rows=2)
    whole = buffer.getvalue()
    start, end = longest_scan(whole)
    pieces = re.split(rb"(\xff[\xd0-\xd7])", whole[start:end])
    for i in rng.sample(range(1, len(pieces), 2), len(pieces) // 6):
        pieces[i] = b""
    return whole, whole[:start] + b"".join(pieces) + whole[end:]


def swap_codes(data: bytes, rng: random.Random) -> bytes:
    """Swap two of the first ten values of a Huffman table, or of all if it has fewer."""
    tables = [found.start() for found in re.finditer(rb"\xff\xc4", data[: longest_scan(data)[0]])]
    numbers = {table: min(10, sum(data[table + 5 : table + 21])) for table in tables}
    start, number = rng.choice([(table, number) for table, number in numbers.items() if number > 1])
    i, j = (start + 21 + k for k in rng.sample(range(number), 2))
    swapped = bytearray(data)
    swapped[i], swapped[j] = data[j], data[i]
    return bytes(swapped)


def damage(data: bytes, kind: str, rng: random.Random) -> bytes:
    """JPEG data, damaged in the entropy-coded segment."""
    start, end = longest_scan(data)
    length = end - start
    at = rng.randrange(start, end)
    if kind == "truncated":
        return data[:at]
    if kind == "cut, end added":
        return data[:at] + b"\xff\xd9"
    if kind == "zeros":
        number = min(65_536, length // 2)
        at = rng.randrange(start, end - number)
        return data[:at] + bytes(number) + data[at + number :]
    if kind == "swapped blocks":
        size = min(4096, length // 4)
        first = rng.randrange(start, end - 2 * size)
        second = rng.randrange(first + size, end - size + 1)
        middle = data[first + size : second]
        return data[:first] + data[second : second + size] + middle + data[first : first + size] + data[second + size :]
    if kind == "flipped bits":
        flipped = bytearray(data)
        for _ in range(rng.randint(1, 16)):
            flipped[rng.randrange(start, end)] ^= 1 << rng.randrange(8)
        return bytes(flipped)
    if kind == "duplicated segment":
        size = min(8192, length // 3)
        return data[: at + size] + data[at:]
    if kind == "inserted bytes":
        return data[:at] + rng.randbytes(rng.choice([1, 16, 512])) + data[at:]
    assert kind == "garbage tail"
    return data[:at] + rng.randbytes(end - at) + b"\xff\xd9"


KINDS = [
    *("truncated", "cut, end added", "zeros", "swapped blocks", "flipped bits", "removed restarts"),
    *("wrong Huffman table", "duplicated segment", "inserted bytes", "garbage tail"),
]


def wrong_share(whole: bytes, damaged: bytes) -> float:
    """The share of pixels that differ by more than 16 levels; 1 if the damaged image can't be read at all."""
    right = simplejpeg.decode_jpeg(whole).astype(int)
    try:
        read = simplejpeg.decode_jpeg(damaged, strict=False)
    except ValueError:
        return 1
    return float((np.abs(right - read).max(2) > 16).mean()) if read.shape == right.shape else 1


@pytest.mark.parametrize("number", [100, pytest.param(2000, marks=pytest.mark.slow)])
def test_damaged_photos_are_refused_at_all_doors(shared, here, number):
    """At least 95 % of those with more than 5 % wrong pixels; the whole ones are read."""
    folder = shared / "data"
    rng = random.Random(number)
    photos = [*sorted(folder.glob("trashnet/*/*/*.jpg")), *sorted(folder.glob("sign_digits/*/*/*.jpg"))]
    photos = rng.sample([photo for photo in photos if photo.stat().st_size < 300_000], number // len(KINDS))
    damaged, refused = Counter(), Counter()
    for photo in photos:
        original = photo.read_bytes()
        if rng.random() < 0.3:
            buffer = io.BytesIO()
            Image.open(photo).save(buffer, "JPEG", progressive=True)
            original = buffer.getvalue()
        (here / "whole.jpg").write_bytes(original)
        assert not any(open_everywhere("whole.jpg")), photo
        for kind in KINDS:
            if kind == "removed restarts":
                whole, broken = remove_restarts(original, rng)
            else:
                whole = original
                broken = swap_codes(whole, rng) if kind == "wrong Huffman table" else damage(whole, kind, rng)
            if wrong_share(whole, broken) > 0.05:
                (here / "damaged.jpg").write_bytes(broken)
                errors = open_everywhere("damaged.jpg")
                assert all(errors) or not any(errors), errors
                damaged[kind] += 1
                refused[kind] += all(errors)
    print({kind: f"{refused[kind]} of {damaged[kind]}" for kind in KINDS})
    assert damaged.total() > 0.6 * number
    assert refused.total() >= 0.95 * damaged.total()


def test_damaged_files_of_others_are_refused_at_all_doors(shared, here):
    files = sorted((shared / "data/hostile_files/damaged_jpegs").glob("*.jpg"))
    assert len(files) > 10
    for file in files:
        errors = open_everywhere(str(file))
        good = file.name == "arithmetic.jpg"  # intact, arithmetic-coded
        assert not any(errors) if good else all(errors), (file, errors)


def test_progressive_images_of_too_many_scans_are_refused(here):
    Image.effect_noise((64, 64), 50).save("a.jpg", progressive=True)
    data = (here / "a.jpg").read_bytes()
    scans = len(list(find_scans(data)))
    start = data.rindex(b"\xff\xda")
    for number, readable in ((MAX_SCANS, True), (MAX_SCANS + 1, False), (5000, False)):
        (here / "a.jpg").write_bytes(data[:start] + data[start:-2] * (number - scans + 1) + data[-2:])
        started = time.monotonic()
        try:
            open_image("a.jpg", max_pixels=64 * 64)
            assert readable
        except ImageError as error:
            assert not readable
            assert "scans takes too long" in error.cause
        assert time.monotonic() - started < SECONDS


def test_scan_bomb(shared):
    errors = open_everywhere(str(shared / "data/hostile_files/scan300k.jpg"))
    assert all("scans takes too long" in error for error in errors)


MEASURE = """
    import json, sys
    from pathlib import Path
    from utils.data import image_io
    from utils.data.decode_budget import bytes_per_pixel
    def memory(field):
        return next(int(line.split()[1]) << 10 for line in open("/proc/self/status") if line.startswith(field))
    rows = {}
    for path in sys.argv[1:]:
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak
        before, allowed, pixels = memory("VmRSS"), 0, 0
        try:
            with image_io._opened(path) as file:
                allowed, pixels = bytes_per_pixel(file.image), file.image.width * file.image.height
            image_io.open_image(path)
            with image_io.open_to_decode(path) as image:
                image.decode((0, 0, image.width, image.height), (image.height, image.width))
            error = ""
        except image_io.ImageError as cause:
            error = str(cause)
        rows[Path(path).name] = [memory("VmHWM") - before, allowed, pixels, error]
    print(json.dumps(rows))
"""


def measure_memory(paths: list[Path]) -> dict[str, tuple[int, int, int, str]]:
    """Of each file: the bytes that reading it took, those assumed per pixel, its pixels, and the error."""
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("peak memory is read from /proc")
    command = [sys.executable, "-c", textwrap.dedent(MEASURE), *map(str, paths)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}  # returns what was freed
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=True)
    return json.loads(done.stdout)


@pytest.mark.slow
@pytest.mark.parametrize("side", [1500, 5000])
def test_memory_of_formats(tmp_path, side):
    """What decoding takes is at most what the budget assumes."""
    noise = np.random.default_rng(0).integers(0, 256, (side // 50, side // 50, 4), dtype=np.uint8)
    rgba = Image.fromarray(noise).resize((side, side))
    rgb = rgba.convert("RGB")
    gray = rgb.convert("L")
    deep = Image.fromarray(np.asarray(gray).astype(np.uint16) * 257)
    exif = Image.Exif()
    exif[0x0112] = 6
    rgb.save(tmp_path / "rgb.jpg", exif=exif)
    rgb.save(tmp_path / "progressive.jpg", progressive=True, subsampling=0)
    rgb.convert("CMYK").save(tmp_path / "cmyk.jpg", progressive=True)
    gray.save(tmp_path / "gray.jpg")
    rgb.save(tmp_path / "rgb.jp2")
    rgba.save(tmp_path / "rgba.jp2")
    rgb.save(tmp_path / "rgb.webp", method=0)
    rgba.save(tmp_path / "rgba.webp", method=0)
    rgb.save(tmp_path / "rgb.avif", speed=10)
    rgba.save(tmp_path / "rgba.avif", speed=10)
    rgba.save(tmp_path / "rgba.png", compress_level=1, exif=exif)
    rgb.save(tmp_path / "rgb.png", compress_level=1)
    rgba.convert("LA").save(tmp_path / "la.png", compress_level=1)
    rgb.convert("P").save(tmp_path / "palette.png", transparency=3, compress_level=1)
    deep.save(tmp_path / "deep.png", compress_level=1)
    deep.save(tmp_path / "deep.jp2")
    Image.fromarray(np.asarray(gray).astype(np.int32)).save(tmp_path / "integers.tif")
    Image.fromarray(np.asarray(gray) / np.float32(255)).save(tmp_path / "floats.tif")
    Image.merge("LAB", rgb.split()).save(tmp_path / "lab.tif")
    rgb.convert("CMYK").save(tmp_path / "cmyk.tif")
    rgb.convert("P").save(tmp_path / "palette.gif", transparency=2)
    for name in ("rgb.bmp", "rgb.ppm", "rgb.tif"):
        rgb.save(tmp_path / name)
    measured = measure_memory(sorted(tmp_path.iterdir()))
    print({name: round(taken / pixels, 1) for name, (taken, _, pixels, _) in measured.items()})
    for name, (taken, allowed, pixels, error) in measured.items():
        assert not error, name
        assert taken <= allowed * pixels + (4 << 20), name


def test_sparse_files_are_not_read_whole(tmp_path):
    """Of 6 GB, on disk almost nothing."""
    for name in ("a.jpg", "a.png", "a.gif", "a.webp", "a.avif", "a.tif", "a.bmp", "a.ppm", "a.jp2"):
        Image.new("RGB", (64, 64)).save(tmp_path / name)
    (tmp_path / "zeros.jpg").touch()
    for path in tmp_path.iterdir():
        os.truncate(path, 6_000_000_000)
    for name, (taken, _, _, error) in measure_memory(sorted(tmp_path.iterdir())).items():
        assert taken < 32 << 20, name
        assert not error if name == "a.tif" else "the file has 6.00 GB" in error, (name, error)


def test_image_of_1_kb_that_takes_2_gb(shared):
    errors = open_everywhere(str(shared / "data/hostile_files/rgb.jp2"))
    assert all("take 2.00 GB to decode" in error for error in errors)


def test_images_of_unknown_colors_are_refused(shared):
    for name in ("file2.jp2", "missing_plte.png"):
        errors = open_everywhere(str(shared / "data/hostile_files/wrong_colours" / name))
        assert all(re.search("channels in another order|its palette is missing", error) for error in errors), errors
